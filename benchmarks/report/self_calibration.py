"""The table of recipes that engines measured, beside other ways to one."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.record import load
from fourier_vllm.evaluation.report import table

REFERENCE, OURS = "calibrate", "measured"
HOWS = (REFERENCE, OURS, "own-text", "predicted")


def tables(results: Path) -> dict[str, str]:
    rows = load(results / "self_calibration.json")
    return {"self_calibration": domains(rows), "self_calibration by model": models(rows)}


def models(rows: list[dict[str, Any]]) -> str:
    """KL by model, means over its domains and contexts."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        kl = {how: [row["kl"] for row in of_model if row["how"] == how] for how in HOWS}
        times = [ours / theirs for ours, theirs in zip(kl[OURS], kl[REFERENCE], strict=True)]
        lines.append(
            [
                model,
                str(len({row["domain"] for row in of_model})),
                ", ".join(f"{x:,}" for x in sorted({row["context"] for row in of_model})),
                *(f"{mean(kl[how]):.4f}" for how in (OURS, REFERENCE, "predicted")),
                f"{min(times):.2f} to {max(times):.2f}",
            ]
        )
    head = ("model", "domains", "contexts", "nothing set", "`calibrate` on the domain")
    return "\n".join(table((*head, "predicted", "first / second, by cell"), lines, 3))


def domains(rows: list[dict[str, Any]]) -> str:
    """KL by model and domain, means over the contexts, and how many times the reference's ours is."""
    found: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for row in rows:
        of_domain = found.setdefault((row["model"], row["domain"]), {})
        of_domain.setdefault(row["how"], {})[row["context"]] = row["kl"]
    lines = []
    for (model, domain), kl in found.items():
        means = {how: mean(kl[how].values()) for how in HOWS if how in kl}
        times = [kl[OURS][context] / x for context, x in kl[REFERENCE].items()]
        lines.append(
            [
                model,
                domain,
                ", ".join(f"{context:,}" for context in kl[OURS]),
                *(f"{means[how]:.4f}" if how in means else "" for how in HOWS),
                f"{means[OURS] / means[REFERENCE]:.2f}",
                f"{max(times):.2f}",
            ]
        )
    head = ("model", "domain", "contexts", "`calibrate` on the domain", "measured", "own text")
    return "\n".join(table((*head, "predicted", "measured / `calibrate`", "largest"), lines, 3))
