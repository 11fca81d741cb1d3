"""Tables of what was compared with stock vLLM, of needles, hits and prefix capacity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.record import load, model_of
from fourier_vllm.evaluation.report import table


def tables(results: Path) -> dict[str, str]:
    return {
        "comparisons": comparisons(load(results / "trust.json")),
        "prefix capacity": capacities(load(results / "prefix_capacity.json")),
        "hit cost": hits(load(results / "hit_cost.json")),
        "served": served(load(results / "serve_vllm033.json")),
        "needles": needles(load(results / "needles_predicted.json")),
        "needles of measured recipes": needles(load(results / "needles_measured.json")),
    }


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


def served(rows: list[dict[str, Any]]) -> str:
    """Rows of `benchmarks/serve.py` of one GPU and vLLM, an engine below the other."""
    head = ("engine", "KV tokens", "context", "batch", "decode step, ms", "all first tokens, ms")
    lines = [
        [
            row["engine"],
            f"{row['kv_tokens']:,}",
            f"{row['context']:,}",
            str(row["batch"]),
            f"{row['itl_ms']:.2f}",
            f"{row['all_first_tokens_ms']:,.0f}",
        ]
        for row in rows
        if "context" in row
    ]
    return "\n".join(table(head, lines, 1))


def needles(results: list[dict[str, Any]]) -> str:
    """Right answers by engine, a column for each model and length."""
    found: dict[str, dict[str, Any]] = {}
    for result in results:
        for row in result["rows"]:
            tokens = row.get("context_tokens", result.get("context_tokens"))
            column = found.setdefault(f"{model_of(result)}, {tokens:,} tokens", {})
            column[row["engine"]] = f"{row['right']} of {row['questions']}"
    engines = list(dict.fromkeys(name for rows in found.values() for name in rows))
    lines = [[x, *(rows.get(x, "") for rows in found.values())] for x in engines]
    return "\n".join(table(("", *found), lines, 1))
