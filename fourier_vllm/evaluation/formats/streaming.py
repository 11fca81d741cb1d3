"""StreamingLLM (arXiv 2309.17453): the middle is dropped, sinks and local window stay.

The original gives the tokens that stay consecutive positions; here they keep their own, as they do
for every other format, so that the same prefilled keys can be used.
"""

from __future__ import annotations

from torch import Tensor

from fourier_vllm.evaluation.formats.base import Held
from fourier_vllm.recipe import ModelFingerprint


class Streaming:
    """Attention to the first and the last tokens only."""

    name = family = "streaming"

    def __init__(self, model: ModelFingerprint):
        pass

    def hold(self, k: Tensor, v: Tensor, start: int, layer: int) -> Held:
        return Held(k[:, :0], v[:, :0], 0.0)
