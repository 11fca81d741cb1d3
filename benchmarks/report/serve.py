"""Tables of engines side by side, of serve.json and first_token.json.

Of rows for the same case the last one counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import load
from fourier_vllm.evaluation.report import table

# In the order of columns.
COLORS = {
    "stock": "#7f7f7f",
    "fp8": "#1f77b4",
    "turboquant": "#9467bd",
    "fourier": "#d62728",
    "fourier quality": "#ff9896",
    "fourier exact": "#ff7f0e",
}

LLAMA, QWEN = (f"{shape} shape, made-up weights" for shape in ("llama-3.1-8b", "qwen3-8b"))
# What a group's tables are called by, its GPU and its model.
GROUPS = {
    "": ("NVIDIA H200", LLAMA),
    "h100 ": ("NVIDIA H100 80GB HBM3", LLAMA),
    "qwen ": ("NVIDIA H200", QWEN),
}
BATCH = 8  # of the pictures' lines
LONG = {"context": 32768, "fit": False, "batch": BATCH}
FIT = {"context": 32768, "fit": True}
# The README's lines from serve.json: what, of which rows, which value, with how many digits.
HEADLINE: tuple[tuple[str, dict[str, Any], str, int], ...] = (
    ("KV tokens at 32,768 tokens a request", {"max_model_len": 32768}, "kv_tokens", 0),
    ("decode tokens/s of as many such requests as fit", FIT, "output_tok_s", 0),
    ("decode step of 8 such requests, ms", LONG, "itl_ms", 2),
)
NEEDLES_MODEL = "qwen05"  # of the README's line on quality

Row = dict[str, Any]


def tables(results: Path) -> dict[str, str]:
    made = {"first tokens": first_tokens(load(results / "first_token.json"))}
    for prefix, rows in groups(results).items():
        made |= {prefix + name: text for name, text in of_group(rows).items()}
        if not prefix:
            made["headline"] = headline(rows, load(results / "needles_measured.json"))
    return made


def groups(results: Path) -> dict[str, list[Row]]:
    """The latest rows of each GPU and model."""
    rows = [row for row in load(results / "serve.json") if "error" not in row]
    return {
        prefix: latest([row for row in rows if (row["gpu"], row["model"]) == group])
        for prefix, group in GROUPS.items()
    }


def name_of(row: Row) -> str:
    return row["engine"] + (f", {row['gpus']} GPUs" if row["gpus"] > 1 else "")


def place(row: Row) -> tuple[int, int]:
    """Where an engine stands among others: stock first, several GPUs last."""
    return row["gpus"], list(COLORS).index(row["engine"])


def names(rows: list[Row]) -> list[str]:
    found = {place(row): name_of(row) for row in rows}
    return [found[k] for k in sorted(found)]


def ratio(x: float, stock: float | None) -> str:
    return f" ({x / stock:.2f}x)" if stock and x != stock else ""


def beside_stock(found: dict[str, float], engines: list[str], digits: int) -> list[str]:
    """A cell an engine, with its ratio to stock; empty where nothing was measured."""
    stock = found.get("stock")
    return [
        f"{found[x]:,.{digits}f}{ratio(found[x], stock)}" if x in found else "" for x in engines
    ]


def pivot(rows: list[Row], keys: Sequence[str], value: str, digits: int) -> str:
    """A line for every combination of `keys`, a column an engine, each with its ratio to stock."""
    engines = names(rows)
    cells: dict[tuple[int, ...], dict[str, float]] = {}
    for row in rows:
        cells.setdefault(tuple(row[k] for k in keys), {})[name_of(row)] = row[value]
    lines = [
        [*(f"{k:,}" for k in key), *beside_stock(found, engines, digits)]
        for key, found in sorted(cells.items())
    ]
    return "\n".join(table([*(k.replace("_", " ") for k in keys), *engines], lines, 0))


def headline(rows: list[Row], needles: list[Row]) -> str:
    """Stock and the plugin, a line each; the last column is the run: speed A, quality B."""
    engines = ["stock", "fourier"]
    lines = []
    for what, case, value, digits in HEADLINE:
        found = {name_of(row): row for row in rows if case.items() <= row.items()}
        if case is FIT:
            what += f": {' and '.join(str(found[x]['batch']) for x in engines)}"
        values = {name: row[value] for name, row in found.items()}
        lines.append([what, *beside_stock(values, engines, digits), "A"])
    asked = next(run for run in needles if run["model"] == NEEDLES_MODEL)
    stock, ours = (
        [row for row in asked["rows"] if row["engine"] == name] for name in ("stock", "fourier {}")
    )
    for one, other in zip(stock, ours, strict=True):
        what = f"needles found of {one['questions']} in {one['context_tokens']:,} tokens"
        lines.append([what, str(one["right"]), str(other["right"]), "B"])
    held = {"stock": stock[0]["kv_tokens"], "fourier": ours[0]["kv_tokens"]}
    longest = max(row["context_tokens"] for row in stock)
    what = f"KV tokens in 1 GiB, requests of up to {longest:,} tokens"
    lines.append([what, *beside_stock(held, engines, 0), "B"])
    return "\n".join(table(["", *engines, "run"], lines))


def fitting(rows: list[Row]) -> str:
    """What the largest batches give."""
    stock = {row["context"]: row["output_tok_s"] for row in rows if name_of(row) == "stock"}
    lines = [
        [
            name_of(row),
            f"{row['context']:,}",
            str(row["batch"]),
            f"{row['itl_ms']:.1f}",
            f"{row['output_tok_s']:,.0f}{ratio(row['output_tok_s'], stock.get(row['context']))}",
            str(row["preemptions"]),
            f"{row['peak_gib']:.1f}",
        ]
        for row in rows
    ]
    head = ["engine", "context", "requests", "ITL, ms", "output tokens/s", "preempted", "GPU, GiB"]
    return "\n".join(table(head, lines))


def line_of(rows: list[Row]) -> tuple[float, float]:
    """Slope and intercept of ITL, ms, over a request's context."""
    slope, intercept = np.polyfit([r["context"] for r in rows], [r["itl_ms"] for r in rows], 1)
    return float(slope), float(intercept)


def slopes(rows: list[Row]) -> str:
    lines = []
    for batch in sorted({row["batch"] for row in rows}):
        for name in names(rows):
            some = [r for r in rows if r["batch"] == batch and name_of(r) == name]
            if len(some) > 1:
                slope, intercept = line_of(some)
                lines.append([name, str(batch), f"{1e6 * slope:.1f}", f"{intercept:.2f}"])
    head = ["engine", "batch", "ns a token of context", "at no context, ms"]
    return "\n".join(table(head, lines))


def latest(rows: list[Row]) -> list[Row]:
    """The last row of each case, by context and engine."""
    keys = ("engine", "gpus", "max_model_len", "context", "fit")
    # How many requests fit is a result.
    found = {
        (*(row.get(k) for k in keys), None if row.get("fit") else row.get("batch")): row
        for row in rows
    }
    return sorted(found.values(), key=lambda row: (row.get("context", 0), *place(row)))


def first_tokens(runs: list[Row]) -> str:
    """Quartiles of engines that took turns, a line a run and engine."""
    lines = [
        [
            "one" if run["one_process"] else "one each",
            run["commit"],
            run["gpu"].removeprefix("NVIDIA "),
            row["engine"],
            ", ".join(f"{x:.1f}" for x in row["ms_quartiles"]),
            ", ".join(f"{x:.3f}" for x in row["to_first_engine_quartiles"]),
        ]
        for run in runs
        for row in run["rows"]
    ]
    head = ["process", "commit", "GPU", "engine", "ms", "ratio to its neighbour"]
    return "\n".join(table(head, lines, 4))


def of_group(rows: list[Row]) -> dict[str, str]:
    measured = [row for row in rows if "context" in row]
    steps = [row for row in measured if not row["fit"]]
    return {
        "capacity": pivot(rows, ("max_model_len",), "kv_tokens", 0),
        "steps": pivot(steps, ("context", "batch"), "itl_ms", 2),
        "prompts": pivot(steps, ("context", "batch"), "all_first_tokens_ms", 0),
        "slopes": slopes(steps),
        "fit": fitting([row for row in measured if row["fit"]]),
    }
