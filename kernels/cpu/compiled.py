"""What numba compiles: one KV head of one request over its pages and its raw tokens.

Loops run over contiguous bytes, so that LLVM makes vector code of them. All of it lies in this one file:
numba's cache notices a change of the file a function is in, not of what the function calls elsewhere.
"""

from __future__ import annotations

import numpy as np

from fourier_vllm.kernels.cpu.disk_cache import jit as cached
from fourier_vllm.kernels.cpu.layout import BFLOAT16, FLOAT16, FLOAT32, Channel, Row, Token, Views

BEYOND_FP16 = np.float32(2.0**16).view(np.uint32)

jit = cached(fastmath={"nsz", "arcp", "contract", "afn", "reassoc"})


@jit
def new_row(size: int) -> Row:
    bits = np.empty(size, np.uint32)
    return Row(bits, bits.view(np.float32))


@jit
def load_halves(source: np.ndarray, start: int, count: int, kind: int, row: Row) -> None:
    """Widen `count` 16-bit floats; fp16 through the exponent bias, so that subnormals work too."""
    halves, bits, values = source[start : start + count], row.bits, row.values
    if kind == BFLOAT16:
        for i in range(count):
            bits[i] = np.uint32(halves[i]) << np.uint32(16)
    else:
        for i in range(count):
            h = np.uint32(halves[i])
            bits[i] = ((h & np.uint32(0x8000)) << np.uint32(16)) | (
                (h & np.uint32(0x7FFF)) << np.uint32(13)
            )
        for i in range(count):
            values[i] *= np.float32(2.0**112)


@jit
def halves_at(views: Views, start: int, count: int) -> np.ndarray:
    """`count` fp16 numbers from byte `start` of the cache."""
    row = new_row(count)
    load_halves(views.u16, start // 2, count, FLOAT16, row)
    return row.values


@jit
def rows_at(views: Views, start: int, rows: int, columns: int) -> np.ndarray:
    """Bytes `[rows, columns]` from byte `start` of the cache."""
    return views.u8[start : start + rows * columns].reshape(rows, columns)


@jit
def load(views: Views, start: int, count: int, kind: int, row: Row) -> None:
    """`count` floats of `kind` from byte `start` of the cache, finite or not."""
    if kind == FLOAT32:
        row.values[:count] = views.f32[start // 4 : start // 4 + count]
        return
    load_halves(views.u16, start // 2, count, kind, row)
    if kind == FLOAT16:
        bits = row.bits
        largest = np.uint32(0)
        for i in range(count):
            largest = max(largest, bits[i] & np.uint32(0x7FFFFFFF))
        if largest >= BEYOND_FP16:  # infinities and NaN, widened as if they were numbers
            for i in range(count):
                if bits[i] & np.uint32(0x7FFFFFFF) >= BEYOND_FP16:
                    bits[i] |= np.uint32(0x7F800000)


@jit
def unpack(codes: np.ndarray, row: np.ndarray) -> None:
    """2-bit codes of one column `[W / 4]` to the numbers of its tokens `[W]`."""
    run = len(codes)
    for f in range(4):
        shift, out = 2 * f, row[f * run : (f + 1) * run]
        for j in range(run):
            out[j] = np.int32((codes[j] >> shift) & 3)


@jit
def add_columns(codes: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
    """Add columns of 2-bit codes `[n, W / 4]`, weighted by `weight [G, n]`, to `out [G, W]`."""
    N, G, W = codes.shape[0], out.shape[0], out.shape[1]
    rows = np.empty((4, W), np.float32)
    for first in range(0, N - N % 4, 4):
        for i in range(4):
            unpack(codes[first + i], rows[i])
        for g in range(G):
            w0, w1 = weight[g, first], weight[g, first + 1]
            w2, w3 = weight[g, first + 2], weight[g, first + 3]
            for t in range(W):
                out[g, t] += w0 * rows[0, t] + w1 * rows[1, t] + w2 * rows[2, t] + w3 * rows[3, t]
    for n in range(N - N % 4, N):
        unpack(codes[n], rows[0])
        for g in range(G):
            for t in range(W):
                out[g, t] += weight[g, n] * rows[0, t]


@jit
def add_codes(
    codes: np.ndarray, bits: int, p: np.ndarray, rows: np.ndarray, out: np.ndarray
) -> None:
    """Add codes of `bits` bits, packed `[W * bits / 8, n]`, weighted by `p [G, W]`, to `out [G, n]`."""
    run, N = codes.shape
    mask = (1 << bits) - 1
    for half in range(2 // bits):
        for j in range(run):
            for f in range(4):
                shift = bits * (4 * half + f)
                for n in range(N):
                    rows[f, n] = np.int32((codes[j, n] >> shift) & mask)
            first = 4 * half * run + j
            for g in range(out.shape[0]):
                p0, p1 = p[g, first], p[g, first + run]
                p2, p3 = p[g, first + 2 * run], p[g, first + 3 * run]
                for n in range(N):
                    out[g, n] += (
                        p0 * rows[0, n] + p1 * rows[1, n] + p2 * rows[2, n] + p3 * rows[3, n]
                    )


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
    scale = halves_at(views, page + c.scale + 2 * c0, C)
    zero = halves_at(views, page + c.zero + 2 * c0, C)
    codes = rows_at(views, page + c.codes + n0 * (W // 4), N, W // 4)
    scratch = new_row(max(D, W))
    row = scratch.values
    weighted = np.empty((G, N), np.float32)
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
    add_columns(codes, weighted, s)
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
    scale = halves_at(views, page + c.scale + 2 * c0, C)
    zero = halves_at(views, page + c.zero + 2 * c0, C)
    codes = rows_at(views, page + c.codes + n0 * (W // 4), N, W // 4)
    scratch = new_row(max(D, W))
    row = scratch.values
    sums = np.empty((G, N), np.float32)
    for n in range(N):
        unpack(codes[n], row)
        for g in range(G):
            dot = np.float32(0.0)
            for w in range(W):
                dot += p[g, w] * row[w]
            sums[g, n] = dot
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
    scale = halves_at(views, page + t.scale + 2 * head * W, W)
    zero = halves_at(views, page + t.zero + 2 * head * W, W)
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
        codes = rows_at(views, page + t.codes + (level * H + head) * quarter * D, quarter, D)
        add_codes(codes, 2, weight, rows, out)
    if t.high >= 0:
        for g in range(G):  # worth 4 of the one level below
            for w in range(W):
                weight[g, w] *= np.float32(4.0)
        codes = rows_at(views, page + t.high + head * eighth * D, eighth, D)
        add_codes(codes, 1, weight, rows, out)


@jit
def _load_blocks(
    local: Views, block: np.ndarray, start: int, count: int, kind: int, cells: Row
) -> None:
    """`count` numbers from element `start` of every block, one block after the other."""
    itemsize = 4 if kind == FLOAT32 else 2
    for b in range(len(block)):
        part = Row(
            cells.bits[b * count : (b + 1) * count], cells.values[b * count : (b + 1) * count]
        )
        load(local, block[b] * local.stride + start * itemsize, count, kind, part)


@cached(fastmath={"nnan", "nsz"})
def _largest(s: np.ndarray) -> np.float32:
    top = s[0]
    for t in range(len(s)):
        top = max(top, s[t])
    return top


@jit
def _exponentiate(s: np.ndarray, top: np.float32, scratch: Row) -> np.float32:
    """Scores to exp(score - top) in place, to 2e-7; their sum. libm's exp is not vector code."""
    for t in range(len(s)):
        x = max((s[t] - top) * np.float32(1.4426950408889634), np.float32(-126.0))
        whole = np.floor(x + np.float32(0.5))
        x = (x - whole) * np.float32(0.6931471805599453)
        s[t] = np.float32(1.0) + x * (
            np.float32(1.0)
            + x
            * (
                np.float32(0.5)
                + x
                * (
                    np.float32(1 / 6)
                    + x * (np.float32(1 / 24) + x * (np.float32(1 / 120) + x * np.float32(1 / 720)))
                )
            )
        )
        scratch.bits[t] = np.uint32(np.int32(whole) + 127) << np.uint32(23)
    total = np.float32(0.0)
    for t in range(len(s)):
        s[t] *= scratch.values[t]
        total += s[t]
    return total


@jit
def _attend_head(
    k: Channel,
    v_channel: Channel,
    v_token: Token,
    pages: Views,
    local: Views,
    page: np.ndarray,
    block: np.ndarray,
    mask: np.ndarray,
    H: int,
    head: int,
    kind: int,
    sink_tokens: int,
    q: np.ndarray,
    out: np.ndarray,
) -> None:
    """One KV head of one request: `q [G, D]`, `out [2, G, D]` from pages and from raw tokens."""
    G, D = q.shape
    W = k.basis.shape[1]
    P, T = len(page), len(mask)
    block_size = T // len(block)
    s, s_raw = np.empty((P, G, W), np.float32), np.empty((G, T), np.float32)
    for i in range(P):
        channel_scores(k, pages, page[i] * pages.stride, head, kind, q, s[i])
    if P:
        s[0, :, :sink_tokens] = -np.inf
    cells = new_row(T * 2 * D)
    raw = cells.values.reshape(T, 2 * D)
    _load_blocks(local, block, head * block_size * 2 * D, block_size * 2 * D, kind, cells)
    for t in range(T):
        if not mask[t]:  # anything, NaN included
            raw[t] = 0.0
        for g in range(G):
            dot = np.float32(0.0)
            for d in range(D):
                dot += q[g, d] * raw[t, d]
            s_raw[g, t] = dot if mask[t] else -np.inf
    powers = new_row(max(W, T))
    for g in range(G):
        top = _largest(s_raw[g])
        for i in range(P):
            top = max(top, _largest(s[i, g]))
        total = _exponentiate(s_raw[g], top, powers)
        for i in range(P):
            total += _exponentiate(s[i, g], top, powers)
        s_raw[g] /= total
        for i in range(P):
            s[i, g] /= total
    out[:] = 0.0
    for i in range(P):
        first = page[i] * pages.stride
        if v_token.bits:
            token_combine(v_token, pages, first, head, H, kind, s[i], out[0])
        else:
            channel_combine(v_channel, pages, first, head, kind, s[i], out[0])
    for t in range(T):
        for g in range(G):
            weight = s_raw[g, t]
            for d in range(D):
                out[1, g, d] += weight * raw[t, D + d]


@jit
def attend(
    k: Channel,
    v_channel: Channel,
    v_token: Token,
    pages: Views,
    local: Views,
    page: np.ndarray,
    page_start: np.ndarray,
    block: np.ndarray,
    mask: np.ndarray,
    kind: int,
    sink_tokens: int,
    q: np.ndarray,
    out: np.ndarray,
    first: int,
    last: int,
) -> None:
    """Work items `first` to `last` of N requests times H heads."""
    H = q.shape[1]
    for item in range(first, last):
        n, head = item // H, item % H
        _attend_head(
            k,
            v_channel,
            v_token,
            pages,
            local,
            page[page_start[n] : page_start[n + 1]],
            block[n],
            mask[n],
            H,
            head,
            kind,
            sink_tokens,
            q[n, head],
            out[n, head],
        )
