"""The tables of decode attention and of a layer's launches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.record import load
from fourier_vllm.evaluation.report import table

COLUMNS = (
    "shape", "recipe", "batch", "context", "floor", "ours (spread)", "of copy bandwidth", "GB/s",
    "FA3 bf16", "FA3 fp8", "TurboQuant", "ours / FA3 bf16",
)  # fmt: skip
NUM_NAMES = 2  # columns of text; the others are numbers
LAUNCHES = ("store", "columns", "pages", "raw", "reduce")


def tables(results: Path) -> dict[str, str]:
    return {
        "decode table": decode(load(results / "decode.json")),
        "layer table": layers(load(results / "layer.json")),
    }


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


def decode(rows: list[dict[str, Any]]) -> str:
    """A line a case: shape, recipe, batch, context."""
    shapes, recipes = (list(dict.fromkeys(row[x] for row in rows)) for x in ("shape", "recipe"))

    def place(row: dict[str, Any]) -> tuple[int, ...]:
        where = shapes.index(row["shape"]), recipes.index(row["recipe"])
        return *where, row["batch"], row["context"]

    rows = sorted(rows, key=place)
    return "\n".join(table(COLUMNS, map(cells, rows), NUM_NAMES))


def layers(rows: list[dict[str, Any]]) -> str:
    """A layer's part of a step, and its launches one by one; commits of a case in the file's order."""
    lines = [
        [
            str(row["batch"]),
            f"{row['context']:,}",
            row["commit"],
            f"{row['layer_us']:.1f}",
            f"{row['fa3_us']:.1f}",
            f"{row['layer_us'] / row['fa3_us']:.2f}",
            *(f"{row[f'{x}_us']:.1f}" for x in LAUNCHES),
        ]
        for row in sorted(rows, key=lambda row: (row["context"], row["batch"]))
    ]
    head = (
        "batch", "context", "commit", "the whole layer", "FA3 with storing", "ours / FA3", *LAUNCHES,
    )  # fmt: skip
    return "\n".join(table(head, lines, 0))
