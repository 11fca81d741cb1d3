"""The table of starts, measured and not."""

from __future__ import annotations

from pathlib import Path

from benchmarks.record import load
from fourier_vllm.evaluation.report import table


def tables(results: Path) -> dict[str, str]:
    lines = [
        [
            row["engine"],
            f"{row['gpus']} {row['gpu']}",
            f"{row['seconds']:.0f}",
            f"{row['kv_tokens']:,}",
        ]
        for row in load(results / "start.json")
    ]
    head = ("engine", "GPUs", "seconds until it is ready", "KV tokens")
    return {"starts": "\n".join(table(head, lines, 2))}
