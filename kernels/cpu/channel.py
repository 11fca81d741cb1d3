"""The channel codec: scores of a page, and weighted sums of it."""

from __future__ import annotations

import numpy as np

from fourier_vllm.kernels.cpu.codes import add_codes
from fourier_vllm.kernels.cpu.layout import Channel
from fourier_vllm.kernels.cpu.memory import (
    FLOAT16,
    FLOAT32,
    Row,
    Views,
    jit,
    load,
    load_halves,
    new_row,
)

LANES = 16


@jit
def _coefficients(
    c: Channel, views: Views, page: int, head: int, i: int, D: int, kind: int, row: Row
) -> None:
    """Row `i` of a head's spectral coefficients, `[D]`."""
    first = (head * c.basis.shape[0] + i) * D
    if c.coef_scale < 0:
        itemsize = 4 if kind == FLOAT32 else 2
        load(views, page + c.coef + first * itemsize, D, kind, row)
        return
    load_halves(views.u16, (page + c.coef_scale) // 2 + first // D, 1, FLOAT16, row)
    start, scale = page + c.coef + first, row.values[0]
    coded = views.u8[start : start + D]
    for d in range(D):
        row.values[d] = scale * np.int32(np.int8(coded[d]))


@jit
def channel_scores(
    c: Channel, views: Views, page: int, head: int, kind: int, q: np.ndarray, s: np.ndarray
) -> None:
    """Scores `s [G, W]` of one page for queries `q [G, D]`."""
    G, D = q.shape
    W = s.shape[1]
    n0, n1 = c.column_start[head], c.column_start[head + 1]
    c0, c1 = c.coded_start[head], c.coded_start[head + 1]
    N, C = n1 - n0, c1 - c0
    scratch, scales, zeros = new_row(max(D, W)), new_row(max(C, 1)), new_row(max(C, 1))
    row, scale, zero = scratch.values, scales.values, zeros.values
    load_halves(views.u16, (page + c.scale) // 2 + c0, C, FLOAT16, scales)
    load_halves(views.u16, (page + c.zero) // 2 + c0, C, FLOAT16, zeros)
    # Whole vectors only: what lies behind a head's columns meets a weight of zero.
    padded = min(-(-N // LANES) * LANES, c.num_columns - n0)
    weighted, rows = np.zeros((G, padded), np.float32), np.empty((4, padded), np.float32)
    for g in range(G):
        for n in range(N):
            i = c.column_coded[n0 + n]
            weighted[g, n] = q[g, c.coded_dim[i]] * scale[i - c0] * c.column_weight[n0 + n]
        constant = np.float32(0.0)
        for i in range(C):
            constant += q[g, c.coded_dim[c0 + i]] * zero[i]
        s[g] = constant
    for i in range(c.basis.shape[0]):
        _coefficients(c, views, page, head, i, D, kind, scratch)
        for g in range(G):
            low = np.float32(0.0)
            for d in range(D):
                low += q[g, d] * row[d]
            for w in range(W):
                s[g, w] += low * c.basis[i, w]
    quarter, stride = W // 4, c.num_columns
    start = page + c.codes
    codes = views.u8[start : start + quarter * stride].reshape(quarter, stride)
    for j in range(quarter):
        for f in range(4):
            shift = 2 * f
            for n in range(padded):
                rows[f, n] = np.int32((codes[j, n0 + n] >> shift) & 3)
        for g in range(G):
            d0 = d1 = d2 = d3 = np.float32(0.0)
            for n in range(padded):
                d0 += weighted[g, n] * rows[0, n]
                d1 += weighted[g, n] * rows[1, n]
                d2 += weighted[g, n] * rows[2, n]
                d3 += weighted[g, n] * rows[3, n]
            s[g, j] += d0
            s[g, quarter + j] += d1
            s[g, 2 * quarter + j] += d2
            s[g, 3 * quarter + j] += d3
    itemsize = 4 if kind == FLOAT32 else 2
    for r in range(c.raw_start[head], c.raw_start[head + 1]):
        load(views, page + c.raw + r * W * itemsize, W, kind, scratch)
        for g in range(G):
            for w in range(W):
                s[g, w] += q[g, c.raw_dim[r]] * row[w]


@jit
def channel_combine(
    c: Channel, views: Views, page: int, head: int, kind: int, p: np.ndarray, out: np.ndarray
) -> None:
    """Add weights `p [G, W]` times one page to `out [G, D]`."""
    G, W = p.shape
    D = out.shape[1]
    n0, n1 = c.column_start[head], c.column_start[head + 1]
    c0, c1 = c.coded_start[head], c.coded_start[head + 1]
    N, C = n1 - n0, c1 - c0
    scratch, scales, zeros = new_row(max(D, W)), new_row(max(C, 1)), new_row(max(C, 1))
    row, scale, zero = scratch.values, scales.values, zeros.values
    load_halves(views.u16, (page + c.scale) // 2 + c0, C, FLOAT16, scales)
    load_halves(views.u16, (page + c.zero) // 2 + c0, C, FLOAT16, zeros)
    sums, rows = np.zeros((G, N), np.float32), np.empty((4, N), np.float32)
    quarter, stride = W // 4, c.num_columns
    start = page + c.codes
    codes = views.u8[start : start + quarter * stride].reshape(quarter, stride)[:, n0:n1]
    if N:
        add_codes(codes, 2, p, rows, sums)
    for g in range(G):
        total = np.float32(0.0)
        for w in range(W):
            total += p[g, w]
        for n in range(N):
            i = c.column_coded[n0 + n]
            out[g, c.coded_dim[i]] += sums[g, n] * scale[i - c0] * c.column_weight[n0 + n]
        for i in range(C):
            out[g, c.coded_dim[c0 + i]] += total * zero[i]
    for i in range(c.basis.shape[0]):
        _coefficients(c, views, page, head, i, D, kind, scratch)
        for g in range(G):
            low = np.float32(0.0)
            for w in range(W):
                low += p[g, w] * c.basis[i, w]
            for d in range(D):
                out[g, d] += low * row[d]
    itemsize = 4 if kind == FLOAT32 else 2
    for r in range(c.raw_start[head], c.raw_start[head + 1]):
        load(views, page + c.raw + r * W * itemsize, W, kind, scratch)
        for g in range(G):
            dot = np.float32(0.0)
            for w in range(W):
                dot += p[g, w] * row[w]
            out[g, c.raw_dim[r]] += dot
