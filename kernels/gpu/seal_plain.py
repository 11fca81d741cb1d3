"""Writes pages in plain order (`page.py`) for `seal.py`. Shapes as there."""

from __future__ import annotations

import triton
import triton.language as tl

from fourier_vllm.kernels.gpu.numbers import (
    eight_bits,
    range_of_tokens,
    round_half_up,
    step_of,
    store_fp16,
    sum_of_shifted,
    to_fp16,
)
from fourier_vllm.kernels.gpu.operands_plain import FP16_MAX


@triton.jit
def packed(b_codes, BITS: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr):
    """Codes `[ROWS, BD]` of 1 or 2 bits to bytes `[ROWS * BITS / 8, BD]`, runs of rows side by side."""
    N: tl.constexpr = 8 // BITS
    return sum_of_shifted(b_codes, N, BITS, ROWS, BD).to(tl.uint8)


@triton.jit
def seal_channel(
    b_x, p_page, i_h, p_basis, p_dims, o_coef, o_coef_scale, o_raw, o_codes, o_scale, o_zero, M,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr,
    SMALL: tl.constexpr, HAS_CODES: tl.constexpr, HAS_RAW: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Write a page's `b_x [W, BD]` float32 as coefficients, raw dims and codes of the rest."""
    o_w, o_d = tl.arange(0, W), tl.arange(0, BD)
    m_d = o_d < D
    p_dim = p_dims + i_h * D + o_d
    b_bits = tl.load(p_dim, mask=m_d, other=0)
    if HAS_RAW:
        b_raw = tl.load(p_dim + 3 * H * D, mask=m_d, other=-1)
        p_raw = (p_page + o_raw).to(tl.pointer_type(DTYPE))
        o_r = b_raw[None, :] * W + o_w[:, None]
        tl.store(p_raw + o_r, b_x.to(DTYPE), mask=(b_raw >= 0)[None, :])
    for i_j in range(M):
        b_e = tl.load(p_basis + i_j * W + o_w)
        # Of what the terms before have left: they are orthogonal.
        b_c = tl.where(b_bits == 16, 0.0, tl.sum(b_e[:, None] * b_x, 0))
        o_c = (i_h * M + i_j) * D + o_d
        if SMALL:
            b_c, scale = eight_bits(b_c)
            tl.store(
                (p_page + o_coef).to(tl.pointer_type(tl.int8)) + o_c, b_c.to(tl.int8), mask=m_d
            )
            p_scale = (p_page + o_coef_scale).to(tl.pointer_type(tl.float16))
            tl.store(p_scale + i_h * M + i_j, scale)
            b_c *= scale.to(tl.float32)
        else:  # the first coefficient is up to sqrt(W) times the largest value
            if tl.float16 == DTYPE:
                b_c = tl.minimum(tl.maximum(b_c, -FP16_MAX), FP16_MAX)
            b_coef = b_c.to(DTYPE)
            tl.store((p_page + o_coef).to(tl.pointer_type(DTYPE)) + o_c, b_coef, mask=m_d)
            b_c = b_coef.to(tl.float32)
        b_x -= b_e[:, None] * b_c[None, :]
    if HAS_CODES:
        b_coded = tl.load(p_dim + H * D, mask=m_d, other=-1)
        b_column = tl.load(p_dim + 2 * H * D, mask=m_d, other=-1)
        b_levels = ((1 << tl.minimum(b_bits, 8)) - 1).to(tl.float32)
        b_zero = to_fp16(tl.min(b_x, 0))
        b_scale = (tl.max(b_x, 0) - b_zero.to(tl.float32)) / tl.maximum(b_levels, 1.0)
        b_scale = to_fp16(tl.maximum(b_scale, 0.0))
        store_fp16(p_page + o_scale, b_coded, b_scale, b_coded >= 0)
        store_fp16(p_page + o_zero, b_coded, b_zero, b_coded >= 0)
        b_codes = round_half_up((b_x - b_zero.to(tl.float32)[None, :]) / step_of(b_scale)[None, :])
        b_codes = tl.minimum(tl.maximum(b_codes, 0.0), b_levels[None, :]).to(tl.int32)
        o_q = tl.arange(0, W // 4)
        for i_level in tl.static_range(4):
            b_bytes = packed((b_codes >> (2 * i_level)) & 3, 2, W, BD)
            m_b = (b_column >= 0) & (b_bits > 2 * i_level)
            o_b = (b_column + i_level)[None, :] * (W // 4) + o_q[:, None]
            tl.store(p_page + o_codes + o_b, b_bytes, mask=m_b[None, :])


@triton.jit
def seal_tokens(
    b_x, o_w, i_e, p_page, i_h, o_codes, o_high, o_scale, o_zero,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, ET: tl.constexpr,
    BITS: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """Write rotated tokens `o_w [8 * ET]` of a page: `ET` from `i_e` on of each eighth."""
    o_d = tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    b_zero, b_scale = range_of_tokens(b_x, BITS, SHARE, D, BD)
    store_fp16(p_page + o_scale, i_h * W + o_w, b_scale, o_w < W)
    store_fp16(p_page + o_zero, i_h * W + o_w, b_zero, o_w < W)
    b_codes = round_half_up((b_x - b_zero.to(tl.float32)[:, None]) / step_of(b_scale)[:, None])
    b_codes = tl.minimum(tl.maximum(b_codes, 0.0), (1 << BITS) - 1.0).to(tl.int32)
    o_i = tl.arange(0, 2 * ET)
    o_q = ((o_i // ET) * (W // 8) + i_e + o_i % ET)[:, None] * D + o_d[None, :]
    for i_level in tl.static_range(BITS // 2):
        b_bytes = packed((b_codes >> (2 * i_level)) & 3, 2, 8 * ET, BD)
        o_v = (i_level * H + i_h) * (W // 4) * D + o_q
        tl.store(p_page + o_codes + o_v, b_bytes, mask=m_d)
    if BITS == 3:
        o_e = (i_h * (W // 8) + i_e + tl.arange(0, ET))[:, None] * D + o_d[None, :]
        tl.store(p_page + o_high + o_e, packed(b_codes >> 2, 1, 8 * ET, BD), mask=m_d)
