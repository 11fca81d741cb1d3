"""Pictures of engines side by side, one a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report.serve import BATCH, COLORS, Row, groups, name_of, names

FILES = {"": "serve.svg", "h100 ": "serve_h100.svg"}  # by the group of rows


def draw_all(results: Path, folder: Path) -> None:
    """Write the pictures."""
    for prefix, rows in groups(results).items():
        if prefix in FILES:
            draw(rows, folder / FILES[prefix])


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
