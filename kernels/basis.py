"""The two orthonormal bases of the page format: DCT-II along the tokens, a rotation across a head's dims."""

from __future__ import annotations

import math
from functools import lru_cache

import torch


@lru_cache
def dct_basis(page_size: int, coefficients: int) -> torch.Tensor:
    """First `coefficients` rows of the orthonormal DCT-II over `page_size` samples.

    Returns
    -------
    torch.Tensor
        Basis E of shape `[m, W]`, float64; coefficients are `E @ x`, the low-pass is `E.T @ E @ x`.
    """
    w = torch.arange(page_size, dtype=torch.float64) + 0.5
    k = torch.arange(coefficients, dtype=torch.float64)
    basis = torch.cos(math.pi / page_size * k[:, None] * w[None]) * math.sqrt(2.0 / page_size)
    basis[:1] /= math.sqrt(2.0)
    return basis


def fragment_basis(page_size: int, coefficients: int) -> torch.Tensor:
    """The rows of `dct_basis` from the second on, rounded to fp16: what fragment order is made with."""
    return dct_basis(page_size, coefficients)[1:].half()


@lru_cache
def rotation(head_size: int) -> torch.Tensor:
    """Orthonormal rotation that spreads a value vector evenly over its dims.

    Hadamard where `head_size` is a power of two; otherwise the Kronecker product of a DCT of the odd
    factor with a Hadamard of the rest, so that every head size has one.

    Returns
    -------
    torch.Tensor
        Shape `[D, D]`, float64; rotate with `v @ R`, undo with `@ R.T`.
    """
    odd = head_size
    power = torch.ones(1, 1, dtype=torch.float64)
    while odd % 2 == 0:
        odd //= 2
        power = torch.cat([torch.cat([power, power], 1), torch.cat([power, -power], 1)], 0)
    return torch.kron(dct_basis(odd, odd), power / math.sqrt(power.shape[0]))
