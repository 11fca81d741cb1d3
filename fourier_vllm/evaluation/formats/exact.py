"""No compression: what every other format is compared with."""

from __future__ import annotations

from torch import Tensor

from fourier_vllm.evaluation.formats.base import RAW_BITS, Held
from fourier_vllm.recipe import ModelFingerprint


class Exact:
    """The cache as the model computed it, counted at 16 bits."""

    name = family = "exact"

    def __init__(self, model: ModelFingerprint):
        pass

    def hold(self, k: Tensor, v: Tensor, start: int, layer: int) -> Held:
        return Held(k[:, start:], v[:, start:], RAW_BITS)
