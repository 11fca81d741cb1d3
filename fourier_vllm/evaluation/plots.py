"""Quality against bytes: one line a family of formats, ours in front."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot as plt

OURS, NONE = "#d62728", "#7f7f7f"
THEIRS = ("#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#17becf", "#bcbd22", "#e377c2")  # no red
MARKERS = "sDv^P*X"
SUFFIXES = ("png", "svg")
# Task, metric, label, whether smaller is better and the axis logarithmic.
PLOTS = (
    ("nll", "kl", "KL to exact attention, nats a token", True),
    ("needle", "logp", "log-probability of a needle's token", False),
    ("multikey", "logp", "log-probability of a needle's token, several keys", False),
    ("multivalue", "logp", "log-probability of a needle's token, several values", False),
    ("vartrack", "logp", "log-probability of a variable's token", False),
    ("agreement", "same", "greedy tokens equal to exact attention's", False),
)


def draw(data: Mapping[str, Any], out: Path) -> list[Path]:
    """Write `TASK.png` and `TASK.svg` of each task whose metric was measured; returns their paths."""
    written = []
    rows = data["rows"]
    for task, metric, label, log in PLOTS:
        if metric not in rows[0]["tasks"].get(task, {}):
            continue
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        lines(axes, rows, task, metric, log)
        settings = data["settings"]
        axes.set_xlabel("bits per cached value, everything counted")
        axes.set_ylabel(label)
        axes.set_title(f"{data['model']}, {settings['context']} tokens", fontsize="medium")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize="small")
        for suffix in SUFFIXES:
            written.append(out / f"{task}.{suffix}")
            figure.savefig(written[-1], dpi=160)
        plt.close(figure)
    return written


def lines(axes: Any, rows: Sequence[Mapping[str, Any]], task: str, metric: str, log: bool) -> None:
    """Formats with bytes as lines of markers, the ones without as horizontals."""
    families: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        families.setdefault(row["family"], []).append(row)
    if log:
        axes.set_yscale("log")
    styles = itertools.cycle(zip(THEIRS, MARKERS, strict=True))
    for family, members in families.items():
        points = sorted((row["bits"], row["tasks"][task][metric], row["name"]) for row in members)
        if log:  # exact has no divergence from itself
            points = [point for point in points if point[1] > 0]
        if not points:
            continue
        if points[0][0] == 0 or family == "exact":
            axes.axhline(points[0][1], color=NONE, linestyle=":", label=family)
            continue
        ours = family == "fourier"
        color, marker = (OURS, "o") if ours else next(styles)
        axes.plot(
            [bits for bits, _, _ in points],
            [value for _, value, _ in points],
            marker=marker,
            color=color,
            linewidth=2.5 if ours else 1,
            zorder=3 if ours else 2,
            label="ours" if ours else family,
        )
        for bits, value, name in points:
            axes.annotate(name, (bits, value), (4, 4), textcoords="offset points", fontsize=7)
