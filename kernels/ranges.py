"""Ranges of the numbers in a page: what fp16 holds, and what codes span."""

from __future__ import annotations

FP16_MAX = 65504.0


def range_share(bits: int) -> float:
    """Share of the range of a token's values that its codes span: at 2 bits, finer steps are worth more
    than the ends of the range."""
    return 0.9 if bits == 2 else 1.0
