"""Codecs and tokens for pages of many recipes."""

from __future__ import annotations

from typing import Any

import torch

from fourier_vllm.kernels.reference.codec import PageCodec
from fourier_vllm.page import PageLayout
from tests.support.numerics import DTYPES

HEAD_SIZES = (32, 64, 80, 96, 112, 128, 192, 256)


def bits_of(D: int, H: int, pattern: str) -> list[list[int]]:
    """Bits per head and dim; heads of `mixed` differ."""
    if pattern.isdigit():
        return [[int(pattern)] * D] * H
    if pattern == "paper":
        return [[16] * (D // 4) + [0] * (D - D // 4)] * H
    if pattern == "coded":
        return [
            [(0, 2, 4, 8, 2, 2, 0)[(h * h + d + d // 5) % 7] for d in range(D)] for h in range(H)
        ]
    return [[(0, 2, 4, 8, 16, 2, 0)[(3 * h + d + d // 5) % 7] for d in range(D)] for h in range(H)]


# name: bits of K, V, coefficients over W, bits of a coefficient
RECIPES: dict[str, Any] = {
    "lossless": ("16", 16, 0, 16),
    "balanced": ("mixed", 2, 1 / 32, 8),
    "quality": ("mixed", 3, 1 / 32, 8),
    "v4": ("8", 4, 1 / 16, 16),
    "v8": ("4", 8, 0, 8),
    "paper": ("paper", "paper", 1 / 8, 16),
    "mixed": ("mixed", "mixed", 1 / 8, 8),
    "low-pass": ("0", 16, 1 / 4, 8),
    "all-coefficients": ("0", "0", 1, 16),
}


# Those that pages in fragment order can hold.
FRAGMENT_RECIPES: dict[str, Any] = {
    "coded-2": ("coded", 2, 1 / 32, 8),
    "coded-3": ("coded", 3, 1 / 32, 8),
    "coded-4": ("coded", 4, 1 / 16, 8),
    "coded-8": ("coded", 8, 0, 8),
    "uncoded": ("0", 2, 1 / 64, 8),
}


def codec_of(
    recipe: str = "mixed",
    H: int = 2,
    D: int = 32,
    W: int = 32,
    dtype: str = "float32",
    fragments: bool = False,
) -> PageCodec:
    k, v, share, coefficient_bits = (RECIPES | FRAGMENT_RECIPES)[recipe]
    layout = PageLayout.build(
        bits_of(D, H, k),
        v if isinstance(v, int) else bits_of(D, H, v),
        head_size=D,
        page_size=W,
        coefficients=round(W * share),
        coefficient_bits=coefficient_bits,
        itemsize=DTYPES[dtype].itemsize,
        fragments=fragments,
    )
    return PageCodec(layout, DTYPES[dtype])


def tokens(
    P: int, codec: PageCodec, seed: int = 0, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """K with slow and fast dims and an offset, V without structure, `[P, W, H, D]`."""
    layout = codec.layout
    rng = torch.Generator().manual_seed(seed)
    shape = (P, layout.page_size, layout.num_kv_heads, layout.head_size)
    t = torch.arange(layout.page_size).float()[:, None, None]
    frequency = torch.logspace(-3, 0, layout.head_size)
    k = torch.randn(shape, generator=rng) * 0.5
    k += 2 * torch.cos(t * frequency) + torch.randn(shape[2:], generator=rng)
    v = torch.randn(shape, generator=rng)
    dtype = dtype or codec.k.dtype
    return k.to(dtype), v.to(dtype)
