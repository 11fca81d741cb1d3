"""KIVI (arXiv 2402.02750): K per channel over groups of tokens, V per token over groups of dims.

Asymmetric min/max, fp16 scale and zero a group, groups of 64. The last group is shorter where the
middle, or the head, is no multiple of 64, and pays for a scale and a zero like the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourier_vllm.evaluation.formats.base import RAW_BITS, Held, bits_per_value
from fourier_vllm.kernels.reference.codecs import quantize, step_of
from fourier_vllm.recipe import ModelFingerprint

GROUP = 64


class Kivi:
    """KIVI at 2, 3, 4 or 8 bits a code."""

    family = "kivi"

    def __init__(self, model: ModelFingerprint, bits: int):
        self.name, self.bits = f"kivi{bits}", bits

    def hold(self, k: Tensor, v: Tensor, start: int, layer: int) -> Held:
        k, v = k[:, start:], v[:, start:]
        (H, n, D), stored = k.shape, self.bits * (k.numel() + v.numel())
        groups = H * D * -(-n // GROUP) + H * n * -(-D // GROUP)
        stored += 2 * RAW_BITS * groups
        by_channel = grouped(k.transpose(1, 2), self.bits).transpose(1, 2)
        return Held(by_channel, grouped(v, self.bits), bits_per_value(stored, k))


def grouped(x: Tensor, bits: int) -> Tensor:
    """Quantise groups of 64 along the last dim of `x [..., n]` and dequantise."""
    parts = []
    for part in x.float().split(GROUP, -1):
        codes, scale, zero = quantize(part, bits)
        parts.append(codes * step_of(scale) + zero.float()[..., None])
    return torch.cat(parts, -1).to(x.dtype)
