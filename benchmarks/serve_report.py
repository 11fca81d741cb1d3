"""Tables and plots of docs/results.md, from what benchmarks/serve.py and first_token.py wrote.

    python benchmarks/serve_report.py [--results benchmarks/results/serve.json] [--page docs/results.md]

Tables go between the page's markers, `<!-- NAME -->` and `<!-- end -->`; the picture lies beside the page.
Of rows for the same case the last one counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pages import put

from fourier_vllm.evaluation.report import table

ROOT = Path(__file__).resolve().parent.parent
COLORS = {
    "stock": "#7f7f7f",
    "fp8": "#1f77b4",
    "turboquant": "#9467bd",
    "fourier": "#d62728",
    "fourier exact": "#ff7f0e",
}

LLAMA, QWEN = (f"{shape} shape, made-up weights" for shape in ("llama-3.1-8b", "qwen3-8b"))
# What a group's tables are called by, its GPU and its model.
GROUPS = {
    "": ("NVIDIA H100 80GB HBM3", LLAMA),
    "h200 ": ("NVIDIA H200", LLAMA),
    "qwen ": ("NVIDIA H200", QWEN),
}

Row = dict[str, Any]


def name_of(row: Row) -> str:
    return row["engine"] + (f", {row['gpus']} GPUs" if row["gpus"] > 1 else "")


def names(rows: list[Row]) -> list[str]:
    """Engines, stock first."""
    found = dict.fromkeys(name_of(row) for row in rows)
    return sorted(found, key=lambda name: name != "stock")


def ratio(x: float, stock: float | None) -> str:
    return f" ({x / stock:.2f}x)" if stock and x != stock else ""


def pivot(rows: list[Row], keys: Sequence[str], value: str, digits: int) -> str:
    """A line for every combination of `keys`, a column an engine, each with its ratio to stock."""
    engines = names(rows)
    cells: dict[tuple[int, ...], dict[str, float]] = {}
    for row in rows:
        cells.setdefault(tuple(row[k] for k in keys), {})[name_of(row)] = row[value]
    lines = []
    for key, line in sorted(cells.items()):
        found = [
            f"{line[name]:,.{digits}f}{ratio(line[name], line.get('stock'))}"
            if name in line
            else ""
            for name in engines
        ]
        lines.append([*(f"{k:,}" for k in key), *found])
    return "\n".join(table([*(k.replace("_", " ") for k in keys), *engines], lines, 0))


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
        for row in sorted(rows, key=lambda r: (r["context"], name_of(r) != "stock"))
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


def draw(rows: list[Row], file: Path) -> None:
    """Capacity, decode steps at batch 8 and throughput of the largest batches."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "serve"  # the same picture from the same numbers
    from matplotlib import pyplot as plt

    sizes = [row for row in rows if row["gpus"] == 1]
    one = [row for row in sizes if "context" in row]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    lens = sorted({row["max_model_len"] for row in sizes})
    engines = names(sizes)
    for i, name in enumerate(engines):
        color = COLORS[name]
        some = {r["max_model_len"]: r["kv_tokens"] / 1e6 for r in sizes if name_of(r) == name}
        at = [lens.index(x) + (i - len(engines) / 2 + 0.5) * 0.8 / len(engines) for x in some]
        left.bar(at, list(some.values()), 0.8 / len(engines), color=color, label=name)
        steps = sorted(
            (r["context"] / 1024, r["itl_ms"])
            for r in one
            if name_of(r) == name and r["batch"] == 8 and not r["fit"]
        )
        if steps:
            middle.plot(*zip(*steps, strict=True), "o-", color=color, label=name)
        fit = [r for r in one if name_of(r) == name and r["fit"]]
        for row in fit:
            label = f"{row['batch']} x {row['context'] // 1024}k"
            bar = right.bar(f"{name}\n{label}", row["output_tok_s"], color=color)
            right.bar_label(bar, fmt="{:,.0f}")
    left.set_xticks(range(len(lens)), [f"{x:,}" for x in lens])
    left.set(xlabel="max_model_len", ylabel="million tokens", title="KV capacity")
    left.legend(frameon=False)
    middle.set(
        xlabel="context, 1,024 tokens", ylabel="ms", title="decode step, batch 8", ylim=(0, None)
    )
    right.set(ylabel="tokens/s", title="decode, as many as fit")
    right.margins(y=0.15)
    figure.savefig(file, metadata={"Date": None})


def latest(rows: list[Row]) -> list[Row]:
    """The last row of each case."""
    keys = ("engine", "gpus", "max_model_len", "context", "fit")
    # How many requests fit is a result.
    found = {
        (*(row.get(k) for k in keys), None if row.get("fit") else row.get("batch")): row
        for row in rows
    }
    return list(found.values())


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


def tables(rows: list[Row]) -> dict[str, str]:
    measured = [row for row in rows if "context" in row]
    steps = [row for row in measured if not row["fit"]]
    return {
        "capacity": pivot(rows, ("max_model_len",), "kv_tokens", 0),
        "steps": pivot(steps, ("context", "batch"), "itl_ms", 2),
        "prompts": pivot(steps, ("context", "batch"), "all_first_tokens_ms", 0),
        "slopes": slopes(steps),
        "fit": fitting([row for row in measured if row["fit"]]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/serve.json")
    parser.add_argument(
        "--first-token", type=Path, default=ROOT / "benchmarks/results/first_token.json"
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs/results.md")
    args = parser.parse_args()
    rows = [row for row in json.loads(args.results.read_text()) if "error" not in row]
    for prefix, group in GROUPS.items():
        some = latest([row for row in rows if (row["gpu"], row["model"]) == group])
        put(args.page, {prefix + name: text for name, text in tables(some).items()})
        if not prefix:
            draw(some, args.page.with_name("serve.svg"))
    runs = json.loads(args.first_token.read_text())
    put(args.page, {"first tokens": first_tokens(runs)})


if __name__ == "__main__":
    main()
