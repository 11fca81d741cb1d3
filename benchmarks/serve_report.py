"""Tables and plots of docs/evidence/results.md and the README's table, from the JSON of two benchmarks.

    python benchmarks/serve_report.py [--results JSON] [--page docs/evidence/results.md]

Tables go between the page's markers, `<!-- NAME -->` and `<!-- end -->`; the pictures lie beside the page.
Of rows for the same case the last one counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pages import put

from fourier_vllm.evaluation.report import table

ROOT = Path(__file__).resolve().parent.parent
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
PICTURES = {"": "serve.svg", "h100 ": "serve_h100.svg"}
BATCH = 8  # of the pictures' lines
LONG = {"context": 32768, "fit": False, "batch": BATCH}
# The README's lines: what, of which rows, which value, with how many digits.
HEADLINE: tuple[tuple[str, dict[str, Any], str, int], ...] = (
    ("KV tokens at 32,768 tokens a request", {"max_model_len": 32768}, "kv_tokens", 0),
    ("such requests at once", {"context": 32768, "fit": True}, "batch", 0),
    ("decode tokens/s of all of them", {"context": 32768, "fit": True}, "output_tok_s", 0),
    ("decode step, 8 requests at 32,768 tokens, ms", LONG, "itl_ms", 2),
    ("decode step, 8 requests at 1,024 tokens, ms", LONG | {"context": 1024}, "itl_ms", 2),
    ("prefill of 8 x 32,768 tokens, ms", LONG, "all_first_tokens_ms", 0),
)

Row = dict[str, Any]


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


def headline(rows: list[Row]) -> str:
    engines = names(rows)
    lines = []
    for what, case, value, digits in HEADLINE:
        found = {name_of(row): row[value] for row in rows if case.items() <= row.items()}
        lines.append([what, *beside_stock(found, engines, digits)])
    return "\n".join(table(["", *engines], lines))


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


def draw(rows: list[Row], file: Path) -> None:
    """One GPU's engines: what fits, when first tokens come, how long steps take, what comes out, memory."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "serve"  # the same picture from the same numbers
    from matplotlib import pyplot as plt

    rows = [row for row in rows if row["gpus"] == 1]
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.4), layout="constrained")
    (capacity, most, memory), (first, step, throughput) = axes
    measured = [row for row in rows if "context" in row]
    lines = [row for row in measured if row["batch"] == BATCH and not row["fit"]]
    bars(capacity, rows, lambda row: row["kv_tokens"] / 1e6)
    capacity.set(title="KV capacity", ylabel="million tokens")
    figure.legend(loc="outside lower center", ncols=len(COLORS), frameon=False)
    bars(most, rows, lambda row: row["kv_tokens"] // row["max_model_len"])
    most.set(title="requests of max_model_len that fit", yscale="log")
    peaks = {
        name: max(r["peak_gib"] for r in measured if name_of(r) == name) for name in names(measured)
    }
    memory.barh(list(peaks), list(peaks.values()), color=[COLORS[name] for name in peaks])
    memory.invert_yaxis()
    memory.set(title="peak memory", xlabel="GiB")
    for axis, value in ((first, "all_first_tokens_ms"), (step, "itl_ms")):
        for name in names(lines):
            some = [(r["context"] / 1024, r[value]) for r in lines if name_of(r) == name]
            axis.plot(*zip(*some, strict=True), "o-", color=COLORS[name], label=name)
    first.set(
        title=f"last first token, batch {BATCH}", xlabel="context, 1,024 tokens", ylabel="ms",
        xscale="log", yscale="log",
    )  # fmt: skip
    step.set(
        title=f"decode step, batch {BATCH}", xlabel="context, 1,024 tokens", ylabel="ms",
        ylim=(0, None),
    )  # fmt: skip
    for row in (row for row in measured if row["fit"]):
        label = f"{row['batch']} x {row['context'] // 1024}k, {name_of(row)}"
        bar = throughput.barh(label, row["output_tok_s"], color=COLORS[row["engine"]])
        throughput.bar_label(bar, fmt=" {:,.0f}")
    throughput.invert_yaxis()
    throughput.margins(x=0.25)
    throughput.set(title="decode, as many as fit", xlabel="tokens/s")
    figure.savefig(file, metadata={"Date": None})


def bars(axis: Any, rows: list[Row], value: Callable[[Row], float]) -> None:
    """Groups of bars by max_model_len."""
    lens = sorted({row["max_model_len"] for row in rows})
    engines = names(rows)
    width = 0.8 / len(engines)
    for i, name in enumerate(engines):
        some = {row["max_model_len"]: value(row) for row in rows if name_of(row) == name}
        at = [lens.index(x) + (i - len(engines) / 2 + 0.5) * width for x in some]
        axis.bar(at, list(some.values()), width, color=COLORS[name], label=name)
    axis.set_xticks(range(len(lens)), [f"{x:,}" for x in lens])
    axis.set(xlabel="max_model_len")


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
    parser.add_argument("--page", type=Path, default=ROOT / "docs/evidence/results.md")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    args = parser.parse_args()
    rows = [row for row in json.loads(args.results.read_text()) if "error" not in row]
    for prefix, group in GROUPS.items():
        some = latest([row for row in rows if (row["gpu"], row["model"]) == group])
        put(args.page, {prefix + name: text for name, text in tables(some).items()})
        if not prefix:
            put(args.readme, {"headline": headline(some)})
        if prefix in PICTURES:
            draw(some, args.page.with_name(PICTURES[prefix]))
    runs = json.loads(args.first_token.read_text())
    put(args.page, {"first tokens": first_tokens(runs)})


if __name__ == "__main__":
    main()
