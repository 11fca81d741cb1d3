"""Puts what a benchmark made into a page of docs."""

from __future__ import annotations

from pathlib import Path

END = "<!-- end -->"


def put(page: Path, made: dict[str, str]) -> None:
    """Write each text behind the page's mark `<!-- NAME -->`, up to the next `<!-- end -->`."""
    text = page.read_text()
    for name, part in made.items():
        mark = f"<!-- {name} -->"
        before, rest = text.split(mark)
        _, after = rest.split(END, 1)
        text = f"{before}{mark}\n{part}\n{END}{after}"
    page.write_text(text)
