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
    return {"self_calibration": domains(load(results / "self_calibration.json"))}


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
