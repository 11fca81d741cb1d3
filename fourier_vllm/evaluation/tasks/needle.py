"""`needle`: a single needle a context, and a single question."""

from __future__ import annotations

from fourier_vllm.evaluation.tasks.base import Probe, Source
from fourier_vllm.evaluation.tasks.multikey import multikey


def needle(source: Source) -> tuple[list[int], list[Probe]]:
    """One number, asked for."""
    return multikey(source, keys=1)
