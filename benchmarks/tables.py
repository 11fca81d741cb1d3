"""The tables of docs/evidence/performance.md, from benchmarks/results/decode.json and layer.json.

    python benchmarks/tables.py [--write]

Prints them; `--write` puts them between the markers of the page instead.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pages import put

from fourier_vllm.evaluation.report import table as markdown

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    "shape", "recipe", "batch", "context", "floor", "ours (spread)", "of copy bandwidth", "GB/s",
    "FA3 bf16", "FA3 fp8", "TurboQuant", "ours / FA3 bf16",
)  # fmt: skip
NUM_NAMES = 2  # columns of text; the others are numbers
LAUNCHES = ("store", "columns", "pages", "raw", "reduce")


def microseconds(x: float | None) -> str:
    if x is None:
        return ""
    return f"{x:.1f}" if x < 10 else f"{x:,.0f}"


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table, as `COLUMNS` says."""
    ours, bf16 = row["ours_us"], row["fa3_bf16_us"]
    return [
        row["shape"],
        row["recipe"],
        str(row["batch"]),
        f"{row['context']:,}",
        microseconds(row["floor_us"]),
        f"{microseconds(ours)} ({microseconds(row['spread_us'])})",
        f"{row['share_of_bandwidth']:.0%}".replace("%", " %"),
        f"{row['gb_per_s']:,.0f}",
        *(microseconds(row[f"{name}_us"]) for name in ("fa3_bf16", "fa3_fp8", "turboquant")),
        "" if bf16 is None else f"{ours / bf16:.2f}",
    ]


def table(rows: list[dict[str, Any]]) -> str:
    shapes, recipes = (list(dict.fromkeys(row[x] for row in rows)) for x in ("shape", "recipe"))

    def place(row: dict[str, Any]) -> tuple[int, ...]:
        where = shapes.index(row["shape"]), recipes.index(row["recipe"])
        return *where, row["batch"], row["context"]

    rows = sorted(rows, key=place)
    return "\n".join(markdown(COLUMNS, map(cells, rows), NUM_NAMES))


def layers(rows: list[dict[str, Any]]) -> str:
    """A layer's part of a step, and its launches one by one."""
    lines = [
        [
            str(row["batch"]),
            f"{row['context']:,}",
            f"{row['layer_us']:.1f}",
            f"{row['fa3_us']:.1f}",
            f"{row['layer_us'] / row['fa3_us']:.2f}",
            *(f"{row[f'{x}_us']:.1f}" for x in LAUNCHES),
        ]
        for row in sorted(rows, key=lambda row: (row["context"], row["batch"]))
    ]
    head = ("batch", "context", "the whole layer", "FA3 with storing", "ours / FA3", *LAUNCHES)
    return "\n".join(markdown(head, lines, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/decode.json")
    parser.add_argument("--layers", type=Path, default=ROOT / "benchmarks/results/layer.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/evidence/performance.md")
    parser.add_argument("--write", action="store_true", help="into the page, between its markers")
    args = parser.parse_args()
    made = {
        "decode table": table(json.loads(args.results.read_text())),
        "layer table": layers(json.loads(args.layers.read_text())),
    }
    if args.write:
        put(args.page, made)
    else:
        print(*made.values(), sep="\n\n")


if __name__ == "__main__":
    main()
