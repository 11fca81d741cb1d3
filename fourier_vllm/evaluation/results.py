"""The results of an evaluation as plain data, and the JSON file that holds them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourier_vllm import _json
from fourier_vllm._text import show
from fourier_vllm.evaluation.formats.base import RAW_BITS

FORMAT = 1
FIELDS = ("model", "settings", "documents_done", "rows")


class Rows:
    """Samples of every format, task and metric, in the order in which they were measured."""

    def __init__(self, families: Mapping[str, str]):
        """`families` has the formats by name."""
        self.families = dict(families)
        self.bits: dict[str, list[float]] = {name: [] for name in families}
        self.samples: dict[str, dict[str, dict[str, list[float]]]] = {n: {} for n in families}

    def add(self, name: str, task: str, metrics: Mapping[str, float]) -> None:
        """One more sample of each metric."""
        for metric, value in metrics.items():
            self.samples[name].setdefault(task, {}).setdefault(metric, []).append(value)

    def dump(self) -> list[dict[str, Any]]:
        """One row a format: bits, ratio, means of the metrics, and the samples behind them."""
        rows = []
        for name, family in self.families.items():
            bits = mean(self.bits[name])
            tasks = {
                task: {metric: mean(values) for metric, values in metrics.items()}
                for task, metrics in self.samples[name].items()
            }
            rows.append(
                {
                    "name": name,
                    "family": family,
                    "bits": bits,
                    "ratio": RAW_BITS / bits if bits else None,  # nothing is kept: no ratio
                    "tasks": tasks,
                    "samples": {"bits": self.bits[name], "tasks": self.samples[name]},
                }
            )
        return rows

    def restore(self, rows: list[dict[str, Any]]) -> None:
        """Go on where `dump` was."""
        for row in rows:
            self.bits[row["name"]] = row["samples"]["bits"]
            self.samples[row["name"]] = row["samples"]["tasks"]


def mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def save(path: Path, results: Mapping[str, Any]) -> None:
    """Write the file atomically; raises RecipeError, a ValueError, where it cannot be written."""
    text = json.dumps(results, indent=1, allow_nan=False)
    _json.write(path, text + "\n", f"results {show(path, 120)}")


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file that `save` wrote.

    Raises
    ------
    ValueError
        There is no such file, or it holds something else.
    """
    again = "give a file that `fourier-vllm eval` wrote."
    try:
        data = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(f"results {show(path, 120)} cannot be read ({reason}): {again}") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError(f"results {show(path, 120)} are not JSON: {again}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"results {show(path, 120)} have another format: {again}")
    missing = [name for name in FIELDS if name not in data]
    if missing or not data["rows"]:
        raise ValueError(f"results {show(path, 120)} lack {(missing or ['rows'])[0]}: {again}")
    return data
