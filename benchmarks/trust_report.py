"""The tables of docs/trust.md, from benchmarks/results/trust.json, prefix_capacity.json and hit_cost.json.

python benchmarks/trust_report.py [--page docs/trust.md]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pages import put

from fourier_vllm.evaluation.report import table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"


def comparisons(rows: list[dict[str, Any]]) -> str:
    """What was compared with stock, a line each."""
    head = ("vLLM", "on", "what", "stock", "ours", "equal", "commit")
    lines = [
        [
            *(str(row[x]) for x in ("vllm", "gpu", "what", "stock", "ours")),
            "yes" if row["equal"] else "**no**",
            row["commit"],
        ]
        for row in rows
    ]
    return "\n".join(table(head, lines, len(head)))


def capacities(result: dict[str, Any]) -> str:
    """Chats that come back."""
    head = ("engine", "model", "KV tokens", "share", "answer tokens", "chats", "full pages found")
    lines = [
        [
            row["engine"],
            row["model"],
            f"{row['kv_tokens']:,}",
            f"{row['share']:.0%}".replace("%", " %"),
            f"{row['answer_tokens']:,}",
            str(row["chats"]),
            f"{row['found']:.1%}".replace("%", " %"),
        ]
        for row in result["rows"]
    ]
    return "\n".join(table(head, lines, 2))


def hits(result: dict[str, Any]) -> str:
    """KL after a hit and without one."""
    spans = [x for x in result["rows"][0] if x.startswith("tokens ")]
    head = ("target", "before the turn", "the turn", *spans)
    lines = [
        [row["target"], row["context"], *(f"{row[x]:.4f}" for x in ("kl", *spans))]
        for row in result["rows"]
    ]
    return "\n".join(table(head, lines, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=ROOT / "docs/trust.md")
    args = parser.parse_args()

    def load(name: str) -> Any:
        return json.loads((RESULTS / name).read_text())

    made = {
        "comparisons": comparisons(load("trust.json")),
        "prefix capacity": capacities(load("prefix_capacity.json")),
        "hit cost": hits(load("hit_cost.json")),
    }
    put(args.page, made)


if __name__ == "__main__":
    main()
