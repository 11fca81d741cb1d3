"""Write every table and picture of README.md and docs/ again, from the JSON in benchmarks/results/.

    python -m benchmarks.report [--root FOLDER]

A table goes between the marks `<!-- NAME -->` and `<!-- end -->`, on whatever page has them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.record import RESULTS, ROOT
from benchmarks.report import kernels, pictures, self_calibration, serve, starts, sweep, trust

END = "<!-- end -->"


def fill(text: str, tables: dict[str, str]) -> tuple[str, set[str]]:
    """A page with the tables it has marks for, and their names."""
    found = set()
    for name, table in tables.items():
        before, mark, rest = text.partition(f"<!-- {name} -->")
        if mark:
            _, after = rest.split(END, 1)
            text = f"{before}{mark}\n{table}\n{END}{after}"
            found.add(name)
    return text, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs/")
    root = parser.parse_args().root
    tables: dict[str, str] = {}
    for part in (kernels, self_calibration, serve, starts, sweep, trust):
        tables |= part.tables(RESULTS)
    missing = set(tables)
    for page in (root / "README.md", *sorted(root.glob("docs/**/*.md"))):
        text, found = fill(page.read_text(), tables)
        page.write_text(text)
        missing -= found
    pictures.draw_all(RESULTS, root / "docs/evidence")
    if missing:
        parser.error(f"no page has marks for: {', '.join(sorted(missing))}")


if __name__ == "__main__":
    main()
