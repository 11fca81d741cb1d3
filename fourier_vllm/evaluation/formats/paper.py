"""FourierAttention (arXiv 2506.11886): low-pass most dims of K and V over the whole middle.

One window of the middle's n tokens, and a real Fourier basis of it:

1. Coefficients of a dim x: c_0 = <x, 1>, a_j = <x, cos(2 pi j t / n)>, b_j = <x, sin(2 pi j t / n)>.
2. The lowest n / 32 of them are kept, in the order c_0, a_1, b_1, a_2, ...
3. What is given back is their sum over the same basis, which is orthonormal here: the least-squares fit.
4. Dims are ranked by the mean square error of that, over all heads of a layer, K and V apart.
5. The inverted pyramid says which share of them is low-passed ("long-context-insensitive"): deeper layers
   keep more dims, V fewer than K. The other dims, the sinks and the local window stay raw.
6. Attention is exact attention over the result.

`paper-rescaled` then stretches each dim around its mean to its original standard deviation, as the
authors' cache does (a scale a dim more). What differs from the authors' code is listed in
docs/evidence/evaluation.md.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from fourier_vllm.evaluation.formats.base import RAW_BITS, Held, bits_per_value
from fourier_vllm.kernels.ranges import FP16_MAX
from fourier_vllm.recipe import ModelFingerprint, paper_pyramid

STATES_SHARE = 1 / 32  # coefficients a token of the window: 1024 at 32k in the paper


class Paper:
    """The global-window form, dims chosen on the very tokens that are compressed."""

    def __init__(
        self, model: ModelFingerprint, rescale: bool = False, states_share: float = STATES_SHARE
    ):
        self.name = self.family = "paper-rescaled" if rescale else "paper"
        self.shares, self.states_share = paper_pyramid(model.num_layers), states_share
        self.rescale = rescale

    def hold(self, k: Tensor, v: Tensor, start: int, layer: int) -> Held:
        k, v = k[:, start:], v[:, start:]
        H, n, D = k.shape
        states = min(n, max(1, round(n * self.states_share)))
        stored, held = 0, []
        for x, share in zip((k, v), self.shares[layer], strict=True):
            low_passed = round(share * H * D)
            stored += RAW_BITS * ((H * D - low_passed) * n + low_passed * states)
            stored += H * D  # which dims: a bit each
            stored += RAW_BITS * low_passed * self.rescale
            held.append(truncate(x, low_passed, states, self.rescale))
        return Held(held[0], held[1], bits_per_value(stored, k))


def truncate(x: Tensor, low_passed: int, states: int, rescale: bool = False) -> Tensor:
    """Low-pass the dims of `x [H, n, D]` that lose least by it.

    Parameters
    ----------
    low_passed, states : int
        How many of the H * D dims, and coefficients kept of each.
    rescale : bool
        Give each low-passed dim its original standard deviation.
    """
    H, n, D = x.shape
    y = x.float().transpose(0, 1).reshape(n, H * D).clone()
    basis = fourier_basis(n, states).to(x.device)
    coefficients = (basis @ y).clamp(-FP16_MAX, FP16_MAX).half().float()  # [states, H * D]
    low = basis.T @ coefficients
    if rescale:
        mean, spread = y.mean(0), low.std(0, correction=0)
        scale = (y.std(0, correction=0) / spread.clamp_min(1e-6)).clamp_max(FP16_MAX)
        # A constant has no spread to stretch.
        low = torch.where(spread > 1e-6, (low - low.mean(0)) * scale.half().float() + mean, low)
    least = (y - low).square().mean(0).argsort()[:low_passed]
    y[:, least] = low[:, least]
    return y.view(n, H, D).transpose(0, 1).to(x.dtype)


@lru_cache(maxsize=4)
def fourier_basis(window: int, states: int) -> Tensor:
    """Lowest rows of the orthonormal real Fourier basis: 1, cos 1, sin 1, cos 2, sin 2, ...

    Returns
    -------
    Tensor [states, window], float32
        Complete, so lossless, at `states == window`.
    """
    t = torch.arange(window, dtype=torch.float64)
    row = torch.arange(states, dtype=torch.float64)
    # sin x = cos(x - pi / 2); row 2 j - 1 is the cosine of frequency j, row 2 j its sine.
    frequency, sine = torch.ceil(row / 2), (row % 2 == 0) & (row > 0)
    angle = 2 * math.pi / window * (frequency[:, None] * t % window)
    basis = torch.cos(angle - math.pi / 2 * sine[:, None])
    return (basis / basis.norm(dim=1, keepdim=True)).float()
