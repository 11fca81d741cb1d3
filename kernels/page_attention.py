"""Attention of a tile of query rows over one sealed page, K never rebuilt (docs/how-it-works.md).

A page is read in four slices of W/4 tokens, the runs that one shift of the packed bytes gives. Shapes: M
query rows, BD dims, QW = W/4, BN columns of codes, MC coefficients.
"""

from __future__ import annotations

import triton
import triton.language as tl

FP16_MAX = tl.constexpr(65504.0)


def _unpack_asm(shift: int, mask: int) -> tl.constexpr:
    """Four bytes to four fp16 codes: or'd into the mantissa of 1024, which is subtracted."""
    return tl.constexpr(
        "{ .reg .b32 t, c; mov.b32 c, 0x64006400;"
        f" shr.b32 t, $2, {shift}; and.b32 t, t, {mask * 0x01010101:#x};"
        " prmt.b32 $0, t, 0x64646464, 0x4140; prmt.b32 $1, t, 0x64646464, 0x4342;"
        " sub.rn.f16x2 $0, $0, c; sub.rn.f16x2 $1, $1, c; }"
    )


CODES_0 = _unpack_asm(0, 3)
CODES_2 = _unpack_asm(2, 3)
CODES_4 = _unpack_asm(4, 3)
CODES_6 = _unpack_asm(6, 3)


@triton.jit
def codes(b_b, SHIFT: tl.constexpr, ASM: tl.constexpr):
    """2-bit codes at `SHIFT` of bytes, as fp16."""
    if ASM:
        CODE: tl.constexpr = (
            CODES_0 if SHIFT == 0 else CODES_2 if SHIFT == 2 else CODES_4 if SHIFT == 4 else CODES_6
        )
        return tl.inline_asm_elementwise(CODE, "=r,=r,r", [b_b], tl.float16, is_pure=True, pack=4)
    return ((b_b >> SHIFT) & 3).to(tl.float16)


@triton.jit
def load_fp16(p_page, o, m):
    return tl.load((p_page + 2 * o).to(tl.pointer_type(tl.float16)), mask=m, other=0.0)


@triton.jit
def coefficients(
    p_page, i_h, o_coef, o_coef_scale, M, MC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    SMALL: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Coefficients `[MC, BD]` float32 of one head."""
    o_j = tl.arange(0, MC)
    o_d = tl.arange(0, BD)
    m_c = (o_j < M)[:, None] & (o_d < D)[None, :]
    o_c = (i_h * M + o_j)[:, None] * D + o_d[None, :]
    if SMALL:
        b_c = tl.load((p_page + o_coef).to(tl.pointer_type(tl.int8)) + o_c, mask=m_c, other=0)
        b_scale = load_fp16(p_page + o_coef_scale, i_h * M + o_j, o_j < M)
        return b_c.to(tl.float32) * b_scale.to(tl.float32)[:, None]
    b_c = tl.load((p_page + o_coef).to(tl.pointer_type(DTYPE)) + o_c, mask=m_c, other=0.0)
    return b_c.to(tl.float32)


@triton.jit
def spectral_scores(
    b_q, p_basis, p_page, i_h, o_coef, o_coef_scale, M, MC: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, QW: tl.constexpr, SMALL: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`E^T (C q)`, `[M, QW]` four times."""
    b_c = coefficients(p_page, i_h, o_coef, o_coef_scale, M, MC, D, BD, SMALL, DTYPE)
    b_y = tl.dot(b_q.to(tl.float32), tl.trans(b_c), input_precision="tf32x3")  # [M, MC]
    o_e = tl.arange(0, MC)[:, None] * (4 * QW) + tl.arange(0, QW)[None, :]
    b_s0 = tl.dot(b_y, tl.load(p_basis + o_e), input_precision="tf32x3")
    b_s1 = tl.dot(b_y, tl.load(p_basis + o_e + QW), input_precision="tf32x3")
    b_s2 = tl.dot(b_y, tl.load(p_basis + o_e + 2 * QW), input_precision="tf32x3")
    b_s3 = tl.dot(b_y, tl.load(p_basis + o_e + 3 * QW), input_precision="tf32x3")
    return b_s0, b_s1, b_s2, b_s3


@triton.jit
def column_scores(
    b_s0, b_s1, b_s2, b_s3, p_q, o_row, m_row, q_scale, p_page, i_h,
    p_column_start, p_column_dim, p_column_coded, p_column_level,
    o_codes, o_scale, o_zero, QW: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Add `codes . (scale * q) + (zero . q)`."""
    o_j = tl.arange(0, QW)
    start, stop = tl.load(p_column_start + i_h), tl.load(p_column_start + i_h + 1)
    b_zero = tl.zeros_like(tl.sum(b_s0, 1))
    for i_n in range(start, stop, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < stop
        b_dim = tl.load(p_column_dim + o_n, mask=m_n, other=0)
        b_coded = tl.load(p_column_coded + o_n, mask=m_n, other=0)
        b_level = tl.load(p_column_level + o_n, mask=m_n, other=0)
        b_scale = load_fp16(p_page + o_scale, b_coded, m_n).to(tl.float32)
        b_first = load_fp16(p_page + o_zero, b_coded, m_n & (b_level == 0)).to(tl.float32)
        m_q = m_row[:, None] & m_n[None, :]
        b_q = tl.load(p_q + o_row[:, None] + b_dim[None, :], mask=m_q, other=0.0)
        b_q = b_q.to(tl.float32) * q_scale
        b_zero += tl.sum(b_q * b_first[None, :], 1)
        b_q *= (b_scale * (1 << (2 * b_level)).to(tl.float32))[None, :]
        b_q = tl.minimum(tl.maximum(b_q, -FP16_MAX), FP16_MAX).to(tl.float16)
        b_b = tl.load(
            p_page + o_codes + o_n[:, None] * QW + o_j[None, :], mask=m_n[:, None], other=0
        )
        b_s0 = tl.dot(b_q, codes(b_b, 0, ASM), b_s0)
        b_s1 = tl.dot(b_q, codes(b_b, 2, ASM), b_s1)
        b_s2 = tl.dot(b_q, codes(b_b, 4, ASM), b_s2)
        b_s3 = tl.dot(b_q, codes(b_b, 6, ASM), b_s3)
    b_zero = b_zero[:, None]
    return b_s0 + b_zero, b_s1 + b_zero, b_s2 + b_zero, b_s3 + b_zero


@triton.jit
def raw_scores(
    b_s0, b_s1, b_s2, b_s3, p_q, o_row, m_row, q_scale, p_page, i_h, p_raw_start, p_raw_dim, o_raw,
    QW: tl.constexpr, BN: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Add the dims that are kept as they are."""
    o_j = tl.arange(0, QW)
    start, stop = tl.load(p_raw_start + i_h), tl.load(p_raw_start + i_h + 1)
    p_raw = (p_page + o_raw).to(tl.pointer_type(DTYPE))
    for i_n in range(start, stop, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < stop
        b_dim = tl.load(p_raw_dim + o_n, mask=m_n, other=0)
        m_q = m_row[:, None] & m_n[None, :]
        b_q = tl.load(p_q + o_row[:, None] + b_dim[None, :], mask=m_q, other=0.0)
        b_q = b_q.to(tl.float32) * q_scale
        p_k = p_raw + o_n[:, None] * (4 * QW) + o_j[None, :]
        m_k = m_n[:, None]
        b_s0 += _dot_raw(b_q, tl.load(p_k, mask=m_k, other=0.0))
        b_s1 += _dot_raw(b_q, tl.load(p_k + QW, mask=m_k, other=0.0))
        b_s2 += _dot_raw(b_q, tl.load(p_k + 2 * QW, mask=m_k, other=0.0))
        b_s3 += _dot_raw(b_q, tl.load(p_k + 3 * QW, mask=m_k, other=0.0))
    return b_s0, b_s1, b_s2, b_s3


@triton.jit
def _dot_raw(b_x, b_y):
    return tl.dot(b_x, b_y.to(tl.float32), input_precision="tf32x3")


@triton.jit
def token_values(
    b_acc, b_p, i_s: tl.constexpr, p_page, i_h, H, o_codes, o_high, o_scale, o_zero,
    D: tl.constexpr, BD: tl.constexpr, QW: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Add slice `i_s` of V's token codec, rotated: weights `b_p [M, QW]` times `[QW, BD]`."""
    o_j = tl.arange(0, QW)
    o_d = tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    if BITS == 16:
        o_v = (i_h * 4 * QW + i_s * QW + o_j)[:, None] * D + o_d[None, :]
        b_v = tl.load((p_page + o_codes).to(tl.pointer_type(DTYPE)) + o_v, mask=m_d, other=0.0)
        return b_acc + _dot_raw(b_p, b_v)
    o_t = i_h * 4 * QW + i_s * QW + o_j
    b_scale = load_fp16(p_page + o_scale, o_t, o_j < QW).to(tl.float32)
    b_zero = load_fp16(p_page + o_zero, o_t, o_j < QW).to(tl.float32)
    b_acc += tl.sum(b_p * b_zero[None, :], 1)[:, None]
    b_p *= b_scale[None, :]
    for i_level in tl.static_range(BITS // 2):
        o_v = ((i_level * H + i_h) * QW + o_j)[:, None] * D + o_d[None, :]
        b_v = tl.load(p_page + o_codes + o_v, mask=m_d, other=0)
        b_acc = tl.dot((b_p * (4**i_level)).to(tl.float16), codes(b_v, 2 * i_s, ASM), b_acc)
    if BITS == 3:  # a bit plane in eighths of the page: two of them make a slice
        EW: tl.constexpr = QW // 2
        o_v = (i_h * EW + o_j % EW)[:, None] * D + o_d[None, :]
        b_v = tl.load(p_page + o_high + o_v, mask=m_d, other=0)
        b_v = ((b_v >> (2 * i_s + o_j // EW)[:, None].to(tl.uint8)) & 1).to(tl.float16)
        b_acc = tl.dot((b_p * 4).to(tl.float16), b_v, b_acc)
    return b_acc


@triton.jit
def channel_values(
    b_acc, b_p0, b_p1, b_p2, b_p3, p_basis, p_page, i_h,
    p_column_start, p_column_dim, p_column_coded, p_column_level, p_raw_start, p_raw_dim,
    o_coef, o_coef_scale, o_raw, o_codes, o_scale, o_zero,
    M, MC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, QW: tl.constexpr, BN: tl.constexpr,
    SMALL: tl.constexpr, HAS_CODES: tl.constexpr, HAS_RAW: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Add V of the channel codec: `(p E^T) C`, codes and raw dims, put in place by one-hot products."""
    o_j = tl.arange(0, QW)
    o_d = tl.arange(0, BD)
    if MC > 0:
        o_e = tl.arange(0, MC)[:, None] * (4 * QW) + o_j[None, :]
        b_y = _dot_raw(b_p0, tl.trans(tl.load(p_basis + o_e)))
        b_y += _dot_raw(b_p1, tl.trans(tl.load(p_basis + o_e + QW)))
        b_y += _dot_raw(b_p2, tl.trans(tl.load(p_basis + o_e + 2 * QW)))
        b_y += _dot_raw(b_p3, tl.trans(tl.load(p_basis + o_e + 3 * QW)))
        b_c = coefficients(p_page, i_h, o_coef, o_coef_scale, M, MC, D, BD, SMALL, DTYPE)
        b_acc += _dot_raw(b_y, b_c)
    if HAS_RAW:
        start, stop = tl.load(p_raw_start + i_h), tl.load(p_raw_start + i_h + 1)
        p_raw = (p_page + o_raw).to(tl.pointer_type(DTYPE))
        for i_n in range(start, stop, BN):
            o_n = i_n + tl.arange(0, BN)
            m_n = o_n < stop
            b_dim = tl.load(p_raw_dim + o_n, mask=m_n, other=-1)
            p_v = p_raw + o_n[None, :] * (4 * QW) + o_j[:, None]
            m_v = m_n[None, :]
            b_x = _dot_raw(b_p0, tl.load(p_v, mask=m_v, other=0.0))
            b_x += _dot_raw(b_p1, tl.load(p_v + QW, mask=m_v, other=0.0))
            b_x += _dot_raw(b_p2, tl.load(p_v + 2 * QW, mask=m_v, other=0.0))
            b_x += _dot_raw(b_p3, tl.load(p_v + 3 * QW, mask=m_v, other=0.0))
            b_acc += _dot_raw(b_x, (b_dim[:, None] == o_d[None, :]).to(tl.float32))
    if HAS_CODES:
        start, stop = tl.load(p_column_start + i_h), tl.load(p_column_start + i_h + 1)
        b_sum = tl.sum(b_p0, 1) + tl.sum(b_p1, 1) + tl.sum(b_p2, 1) + tl.sum(b_p3, 1)
        for i_n in range(start, stop, BN):
            o_n = i_n + tl.arange(0, BN)
            m_n = o_n < stop
            b_dim = tl.load(p_column_dim + o_n, mask=m_n, other=-1)
            b_coded = tl.load(p_column_coded + o_n, mask=m_n, other=0)
            b_level = tl.load(p_column_level + o_n, mask=m_n, other=0)
            b_scale = load_fp16(p_page + o_scale, b_coded, m_n).to(tl.float32)
            b_first = load_fp16(p_page + o_zero, b_coded, m_n & (b_level == 0)).to(tl.float32)
            b_b = tl.load(
                p_page + o_codes + o_n[None, :] * QW + o_j[:, None], mask=m_n[None, :], other=0
            )
            b_x = _dot_raw(b_p0, b_b & 3)
            b_x += _dot_raw(b_p1, (b_b >> 2) & 3)
            b_x += _dot_raw(b_p2, (b_b >> 4) & 3)
            b_x += _dot_raw(b_p3, b_b >> 6)
            b_x *= (b_scale * (1 << (2 * b_level)).to(tl.float32))[None, :]
            b_x += b_sum[:, None] * b_first[None, :]
            b_acc += _dot_raw(b_x, (b_dim[:, None] == o_d[None, :]).to(tl.float32))
    return b_acc
