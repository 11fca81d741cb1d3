"""Writes pages in fragment order (`page.py`) for `seal.py`. Shapes as there."""

from __future__ import annotations

import triton
import triton.language as tl

from fourier_vllm.kernels.gpu.numbers import (
    eight_bits,
    range_of_tokens,
    step_of,
    store_fp16,
    sum_of_shifted,
    to_fp16,
)
from fourier_vllm.kernels.gpu.operands_plain import FP16_MAX


@triton.jit
def swapped(o_x):
    """Where numbers 0, 1, 2, 3 of every four lie."""
    return o_x // 4 * 4 + o_x % 2 * 2 + o_x % 4 // 2


@triton.jit
def store_columns(
    p_page, o_codes, b_codes, p_column_start, p_column_dim, p_column_level, i_h,
    W: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Write the head's columns of codes `[W, BD]` of up to 8 bits, four columns a word."""
    QW: tl.constexpr = W // 4
    b_four = sum_of_shifted(b_codes, 4, 8, W, BD)  # a byte of each slice, [QW, BD]
    start, stop = tl.load(p_column_start + i_h) * 4, tl.load(p_column_start + i_h + 1) * 4
    o_j = tl.arange(0, QW)
    o_w = (o_j % 8 * (W // 32) + o_j // 8)[:, None]
    b_shift = swapped(tl.arange(0, 4)) * 8
    for i_n in range(start, stop, BN):
        o_n = i_n + tl.arange(0, BN)
        b_dim = tl.load(p_column_dim + o_n, mask=o_n < stop, other=-1)
        b_level = tl.load(p_column_level + o_n, mask=o_n < stop, other=0)
        b_index = tl.broadcast_to(tl.maximum(b_dim, 0)[None, :], (QW, BN))
        b_x = tl.gather(b_four, b_index, 1) >> (2 * b_level)[None, :]
        # The bits of four bytes come together in the topmost.
        b_x = ((b_x & 0x03030303) * 0x01041040).to(tl.uint32) >> 24
        b_x = tl.where((b_dim >= 0)[None, :], b_x, 0).to(tl.int32)
        b_words = tl.sum(tl.reshape(b_x, (QW, BN // 4, 4)) << b_shift[None, None, :], 2)
        o_g = i_n // 4 + tl.arange(0, BN // 4)
        p_words = (p_page + o_codes).to(tl.pointer_type(tl.int32)) + o_g[None, :] * QW
        tl.store(p_words + o_w, b_words, mask=(o_g < stop // 4)[None, :])


@triton.jit
def seal_columns(
    b_x, p_page, i_h, p_basis, p_dims, p_column_start, p_column_dim, p_column_level,
    o_coef, o_coef_scale, o_codes, o_scale, o_zero, M,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, MEANS: tl.constexpr,
):  # fmt: skip
    """Write a page's `b_x [W, BD]` float32 as coefficients, zeros or means, and codes."""
    o_w, o_d = tl.arange(0, W), tl.arange(0, BD)
    m_d = o_d < D
    for i_j in range(M):
        b_e = tl.load(p_basis + i_j * W + o_w)
        # Of what the terms before have left: they are orthogonal, but for their rounding.
        b_c = tl.sum(b_e[:, None] * b_x, 0)
        b_c, scale = eight_bits(b_c)
        o_c = (i_h * M + i_j) * D + swapped(o_d)
        tl.store(p_page + o_coef + o_c, (b_c + 128).to(tl.uint8), mask=m_d)
        p_scale = (p_page + o_coef_scale).to(tl.pointer_type(tl.float16))
        tl.store(p_scale + i_h * M + i_j, scale)
        b_x -= b_e[:, None] * (b_c * scale.to(tl.float32))[None, :]
    p_dim = p_dims + i_h * D + o_d
    b_bits = tl.load(p_dim, mask=m_d, other=0)
    b_column = tl.load(p_dim + 2 * H * D, mask=m_d, other=-1)
    b_levels = ((1 << b_bits) - 1).to(tl.float32)
    b_low = to_fp16(tl.min(b_x, 0))
    b_rest = to_fp16(tl.sum(b_x, 0) / W) if MEANS else tl.zeros([BD], tl.float16)
    b_zero = tl.where(b_bits > 0, b_low, b_rest)
    store_fp16(p_page + o_zero, i_h * D + o_d, b_zero, m_d)
    # The last column's scale, 4^level larger, must be finite too.
    b_limit = FP16_MAX / (1 << tl.maximum(b_bits - 2, 0)).to(tl.float32)
    b_scale = (tl.max(b_x, 0) - b_zero.to(tl.float32)) / tl.maximum(b_levels, 1.0)
    b_scale = tl.minimum(tl.maximum(b_scale, 0.0), b_limit).to(tl.float16)
    for i_level in tl.static_range(4):
        m_n = (b_column >= 0) & (b_bits > 2 * i_level)
        b_weight = (b_scale.to(tl.float32) * 4**i_level).to(tl.float16)
        store_fp16(p_page + o_scale, b_column + i_level, b_weight, m_n)
    stop = tl.load(p_column_start + i_h + 1) * 4
    o_n = stop - 4 + tl.arange(0, 4)
    b_dim = tl.load(p_column_dim + o_n, mask=o_n >= 0, other=0)
    store_fp16(p_page + o_scale, o_n, tl.zeros([4], tl.float16), b_dim < 0)
    b_codes = nearest_codes(b_x, b_zero[None, :], b_scale[None, :], b_levels[None, :])
    store_columns(
        p_page, o_codes, b_codes, p_column_start, p_column_dim, p_column_level, i_h, W, BD, 64
    )


@triton.jit
def nearest_codes(b_x, b_zero, b_scale, b_levels):
    """Codes of `b_x`, int32."""
    b_step = 1.0 / step_of(b_scale)
    b_code = b_x * b_step - b_zero.to(tl.float32) * b_step
    b_code = tl.minimum(tl.maximum(b_code, 0.0), b_levels)
    # Rounds to the nearest where floats have no fraction left.
    return (b_code + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000


@triton.jit
def token_of_row(o_r, i_k, W: tl.constexpr):
    """Slice and place in it of rows `[64]`: four runs of the 16 tokens that share a word with each other."""
    return o_r // 4 % 4, i_k * 16 + o_r // 16 * 4 + o_r % 4


@triton.jit
def store_words(
    p_page, o_x, b_words, i_k, D: tl.constexpr, BD: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """Write words `[4, BD]` of run `i_k`, E of a lane together."""
    o_d, i_t = tl.arange(0, BD)[None, :], tl.arange(0, 4)[:, None]
    o_w = ((i_k * (D // (8 * E)) + o_d // (8 * E)) * 32 + i_t * 8 + o_d % 8) * E + o_d // 8 % E
    tl.store((p_page + o_x).to(tl.pointer_type(tl.int32)) + o_w, b_words, mask=o_d < D)


@triton.jit
def seal_rotated(
    b_x, i_k, p_page, i_h, o_codes, o_high, o_scale, o_zero,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr,
    SHARE: tl.constexpr, EV: tl.constexpr, EH: tl.constexpr,
):  # fmt: skip
    """Write rotated tokens `b_x [64, BD]`, run `i_k` of 16 of each slice, rows as `token_of_row` says."""
    QW: tl.constexpr = W // 4
    b_zero, b_scale = range_of_tokens(b_x, BITS, SHARE, D, BD)
    o_r = tl.arange(0, 64)
    i_n, o_j = token_of_row(o_r, i_k, W)
    o_w = i_h * W + o_j % 8 * (W // 8) + i_n * (W // 32) + o_j // 8
    store_fp16(p_page + o_scale, o_w, b_scale, o_r < 64)
    store_fp16(p_page + o_zero, o_w, b_zero, o_r < 64)
    b_codes = nearest_codes(b_x, b_zero[:, None], b_scale[:, None], (1 << BITS) - 1.0)
    b_shift = (2 * i_n + 8 * swapped(o_r % 4))[:, None]
    for i_level in tl.static_range(BITS // 2):
        b_bits = ((b_codes >> (2 * i_level)) & 3) if BITS > 2 else b_codes
        b_words = tl.sum(tl.reshape(b_bits << b_shift, (4, 16, BD)), 1)
        store_words(p_page, o_codes + (i_level * H + i_h) * QW * D, b_words, i_k, D, BD, EV)
    if BITS == 3:
        b_words = tl.sum(tl.reshape((b_codes >> 2) << b_shift, (4, 16, BD)), 1)
        b_words = tl.reshape(b_words, (4, BD // 16, 2, 8)) << tl.arange(0, 2)[None, None, :, None]
        b_words = tl.reshape(tl.sum(b_words, 2), (4, BD // 2))
        store_words(p_page, o_high + i_h * (QW * D // 2), b_words, i_k, D // 2, BD // 2, EH)
