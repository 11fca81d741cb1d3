"""The table of starts, measured and not."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.record import load
from fourier_vllm.evaluation.report import table


def tables(results: Path) -> dict[str, str]:
    """Starts of one kind on one machine in a line, in the mean."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in load(results / "start.json"):
        found.setdefault((f"{row['gpus']} {row['gpu']}", row["engine"]), []).append(row)
    lines = [
        [
            engine,
            gpus,
            str(len(rows)),
            f"{mean(row['seconds'] for row in rows):.1f}",
            f"{rows[-1]['kv_tokens']:,}",
        ]
        for (gpus, engine), rows in found.items()
    ]
    head = ("engine", "GPUs", "starts", "seconds until it is ready", "KV tokens")
    return {"starts": "\n".join(table(head, lines, 2))}
