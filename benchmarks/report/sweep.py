"""The tables of the sweep: a column for every part of a choice that varies in a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.record import load

MEASURED = ("kl", "kl_of_documents", "nll", "smaller")


def tables(results: Path) -> dict[str, str]:
    data = load(results / "sweep.json")
    lines = [
        f"{data['model']} on {data['machine']['device']}, {data['documents']} documents of"
        f" {data['context']} tokens, {data['scored']} scored, commit {data['commit']}.",
    ]
    for name, rows in data["tables"].items():
        lines += ["", f"### {name}", "", *table(rows)]
    return {"sweep": "\n".join(lines) + "\n"}


def table(rows: list[dict[str, Any]]) -> list[str]:
    varying = [
        name
        for name in rows[0]
        if name not in MEASURED and len({str(row[name]) for row in rows}) > 1
    ]
    header = [*(name.replace("_", " ") for name in varying), "smaller by", "KL", "NLL"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        values = [row[name] for name in varying]
        cells = [" ".join(map(str, x)) if isinstance(x, list) else str(x) for x in values]
        cells += [f"{row['smaller']:.2f}", f"{row['kl']:.4f}", f"{row['nll']:+.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
