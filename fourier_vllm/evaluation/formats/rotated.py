"""Rotated per-token codes, the mean-square form of TurboQuant (arXiv 2504.19874), for K and V.

A vector is divided by its norm (kept in fp16) and rotated at random (signs, then the rotation of the
page format), after which every dim looks like one dim of a random unit vector whatever the data. A
Lloyd-Max codebook for that distribution is optimal and needs no scale.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fourier_vllm.evaluation.formats.base import RAW_BITS, Held, bits_per_value
from fourier_vllm.kernels.basis import rotation
from fourier_vllm.kernels.ranges import FP16_MAX
from fourier_vllm.recipe import ModelFingerprint

# The levels shorten a vector; the kept norm makes up for it, as in vLLM's presets `turboquant_*_nc`.
# Those have 3 and 4 bits; at 2 bits on SmolLM2 the KL is lower without.
CORRECTED_FROM = 3
GRID = 20001
ITERATIONS = 300


class Rotated:
    """One codebook, one norm a token and head, b bits a value."""

    family = "rotated"

    def __init__(self, model: ModelFingerprint, bits: int):
        self.name, self.bits = f"rotated{bits}", bits

    def hold(self, k: Tensor, v: Tensor, start: int, layer: int) -> Held:
        k, v = k[:, start:], v[:, start:]
        H, n, D = k.shape
        stored = 2 * H * n * (self.bits * D + RAW_BITS)
        held = [through_codebook(x, self.bits) for x in (k, v)]
        return Held(held[0], held[1], bits_per_value(stored, k))


def through_codebook(x: Tensor, bits: int) -> Tensor:
    """Code vectors `x [..., D]` and decode them."""
    D = x.shape[-1]
    book = codebook(D, bits).to(x.device)
    turn = signed_rotation(D).to(x.device)
    norm = x.float().norm(dim=-1, keepdim=True)
    unit = (x.float() / norm.clamp_min(1e-12)) @ turn
    levels = book[torch.bucketize(unit, (book[1:] + book[:-1]) / 2)]
    if bits >= CORRECTED_FROM:
        norm = norm / levels.norm(dim=-1, keepdim=True)
    norm = norm.clamp_max(FP16_MAX).half().float()
    return ((levels @ turn.T) * norm).to(x.dtype)


@lru_cache
def signed_rotation(head_size: int) -> Tensor:
    """Random signs times the rotation of the page format, `[D, D]` float32; the same every time."""
    generator = torch.Generator().manual_seed(head_size)
    signs = torch.randint(0, 2, (head_size, 1), generator=generator) * 2.0 - 1.0
    return (signs * rotation(head_size)).float()


@lru_cache
def codebook(head_size: int, bits: int) -> Tensor:
    """Lloyd-Max levels `[2^bits]`, float32, for one dim of a uniform unit vector of D dims.

    Its density is proportional to `(1 - x^2)^((D - 3) / 2)`.
    """
    x = torch.linspace(-1, 1, GRID, dtype=torch.float64)
    density = (1 - x.square()).clamp_min(0).pow((head_size - 3) / 2)
    mass = torch.cat([density.new_zeros(1), density.cumsum(0)])
    moment = torch.cat([density.new_zeros(1), (density * x).cumsum(0)])
    # Levels start at equal shares of the mass.
    share = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    levels = x[torch.searchsorted(mass[1:], share * mass[-1]).clamp_max(GRID - 1)]
    for _ in range(ITERATIONS):
        edges = torch.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        edges = torch.cat([edges.new_zeros(1), edges, edges.new_full((1,), GRID)])
        inside = (mass[edges[1:]] - mass[edges[:-1]]).clamp_min(1e-300)
        levels = (moment[edges[1:]] - moment[edges[:-1]]) / inside
    return levels.float()
