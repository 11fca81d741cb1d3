"""fp8 (e4m3), one scale a tensor: vLLM's `--kv-cache-dtype fp8` with calibrated scales."""

from __future__ import annotations

import torch
from torch import Tensor

from fourier_vllm.evaluation.formats.base import Held, bits_per_value
from fourier_vllm.recipe import ModelFingerprint

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
SCALE_BITS = 32


class Fp8:
    """Keys and values of a layer as e4m3 with one float32 scale each."""

    name = family = "fp8"

    def __init__(self, model: ModelFingerprint):
        pass

    def hold(self, k: Tensor, v: Tensor, start: int, layer: int) -> Held:
        k, v = k[:, start:], v[:, start:]
        stored = 8 * (k.numel() + v.numel()) + 2 * SCALE_BITS
        return Held(through_fp8(k), through_fp8(v), bits_per_value(stored, k))


def through_fp8(x: Tensor) -> Tensor:
    """Nearest e4m3 values of `x`, of any shape, under a scale that its largest value fills."""
    scale = (x.float().abs().amax() / FP8_MAX).clamp_min(1e-12)
    return ((x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8).float() * scale).to(x.dtype)
