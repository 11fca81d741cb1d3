"""The token codec: weighted sums of a page of rotated values."""

from __future__ import annotations

import numpy as np

from fourier_vllm.kernels.cpu.codes import add_codes
from fourier_vllm.kernels.cpu.layout import Token
from fourier_vllm.kernels.cpu.memory import FLOAT16, FLOAT32, Views, jit, load, load_halves, new_row


@jit
def token_combine(
    t: Token, views: Views, page: int, head: int, H: int, kind: int, p: np.ndarray, out: np.ndarray
) -> None:
    """Add weights `p [G, W]` times one page of rotated values to `out [G, D]`."""
    G, W = p.shape
    D = out.shape[1]
    if t.bits == 16:
        scratch = new_row(D)
        row = scratch.values
        itemsize = 4 if kind == FLOAT32 else 2
        for w in range(W):
            load(views, page + t.codes + (head * W + w) * D * itemsize, D, kind, scratch)
            for g in range(G):
                for d in range(D):
                    out[g, d] += p[g, w] * row[d]
        return
    scales, zeros = new_row(W), new_row(W)
    scale, zero = scales.values, zeros.values
    load_halves(views.u16, (page + t.scale) // 2 + head * W, W, FLOAT16, scales)
    load_halves(views.u16, (page + t.zero) // 2 + head * W, W, FLOAT16, zeros)
    for g in range(G):
        constant = np.float32(0.0)
        for w in range(W):
            constant += p[g, w] * zero[w]
        for d in range(D):
            out[g, d] += constant
    weight = np.empty((G, W), np.float32)
    rows = np.empty((4, D), np.float32)
    quarter, eighth = W // 4, W // 8
    for level in range(t.bits // 2):
        for g in range(G):
            for w in range(W):
                weight[g, w] = p[g, w] * scale[w] * np.float32(4**level)
        start = page + t.codes + (level * H + head) * quarter * D
        codes = views.u8[start : start + quarter * D].reshape(quarter, D)
        add_codes(codes, 2, weight, rows, out)
    if t.high >= 0:
        for g in range(G):  # worth 4 of the one level below
            for w in range(W):
                weight[g, w] *= np.float32(4.0)
        start = page + t.high + head * eighth * D
        codes = views.u8[start : start + eighth * D].reshape(eighth, D)
        add_codes(codes, 1, weight, rows, out)
