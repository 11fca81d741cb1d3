"""Attention of a tile of query rows over one sealed page, K never rebuilt (docs/understand/how-it-works.md).

A page is read in four slices of W/4 tokens, the runs that one shift of the packed bytes gives. Tokens and
dims are the left side of every product: a tile of few query rows then wastes none. Shapes: BM query rows,
BD dims, QW = W/4, BN columns of codes, MC coefficients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fourier_vllm.kernels import ranges

FP16_MAX = tl.constexpr(ranges.FP16_MAX)


def _unpack_asm(pick: str, offset: str = "0x64006400") -> tl.constexpr:
    """Four bytes to four fp16 numbers: or'd into the mantissa of 1024, then `offset` is subtracted."""
    return tl.constexpr(
        f"{{ .reg .b32 t, c; mov.b32 c, {offset}; {pick}"
        " prmt.b32 $0, t, 0x64646464, 0x4140; prmt.b32 $1, t, 0x64646464, 0x4342;"
        " sub.rn.f16x2 $0, $0, c; sub.rn.f16x2 $1, $1, c; }"
    )


CODES_0 = _unpack_asm("and.b32 t, $2, 0x03030303;")
CODES_2 = _unpack_asm("shr.b32 t, $2, 2; and.b32 t, t, 0x03030303;")
CODES_4 = _unpack_asm("shr.b32 t, $2, 4; and.b32 t, t, 0x03030303;")
CODES_6 = _unpack_asm("shr.b32 t, $2, 6; and.b32 t, t, 0x03030303;")
SIGNED = _unpack_asm("xor.b32 t, $2, 0x80808080;", "0x64806480")  # 1024 + 128
MASKED = _unpack_asm("and.b32 t, $2, $3;")


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
def masked(b_b, b_m, ASM: tl.constexpr):
    """`b_b & b_m`, as fp16."""
    if ASM:
        return tl.inline_asm_elementwise(
            MASKED, "=r,=r,r,r", [b_b, b_m], tl.float16, is_pure=True, pack=4
        )
    return (b_b & b_m).to(tl.float16)


@triton.jit
def signed(b_b, ASM: tl.constexpr):
    """int8 as fp16."""
    if ASM:
        return tl.inline_asm_elementwise(SIGNED, "=r,=r,r", [b_b], tl.float16, is_pure=True, pack=4)
    return b_b.to(tl.float16)


@triton.jit
def dot_exact(b_x, b_y):
    return tl.dot(b_x.to(tl.float32), b_y.to(tl.float32), input_precision="tf32x3")


@triton.jit
def load_channel(p_table, p_page, o_n, m_n, p_coded, p_level, o_scale, o_zero):
    """Dim, scale and zero of columns of codes; a dim's zero comes with its first column."""
    b_dim = tl.load(p_table + o_n, mask=m_n, other=-1)
    b_coded = tl.load(p_coded + o_n, mask=m_n, other=0)
    b_level = tl.load(p_level + o_n, mask=m_n, other=0)
    b_scale = load_fp16(p_page + o_scale, b_coded, m_n).to(tl.float32)
    b_zero = load_fp16(p_page + o_zero, b_coded, m_n & (b_level == 0)).to(tl.float32)
    return b_dim, b_scale * (1 << (2 * b_level)).to(tl.float32), b_zero


@triton.jit
def load_coefficients(
    p_page, i_h, o_coef, o_coef_scale, M, MC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    SMALL: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Coefficients `[MC, BD]` of one head and what they are worth, `[MC]`."""
    o_j = tl.arange(0, MC)
    o_d = tl.arange(0, BD)
    m_c = (o_j < M)[:, None] & (o_d < D)[None, :]
    o_c = (i_h * M + o_j)[:, None] * D + o_d[None, :]
    if SMALL:
        b_c = tl.load((p_page + o_coef).to(tl.pointer_type(tl.int8)) + o_c, mask=m_c, other=0)
        b_scale = load_fp16(p_page + o_coef_scale, i_h * M + o_j, o_j < M).to(tl.float32)
    else:
        b_c = tl.load((p_page + o_coef).to(tl.pointer_type(DTYPE)) + o_c, mask=m_c, other=0.0)
        b_scale = tl.full([MC], 1.0, tl.float32)
    return b_c, b_scale


@triton.jit
def spectral_scores(
    b_q, p_basis, p_page, i_h, o_coef, o_coef_scale, M, MC: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, QW: tl.constexpr, BM: tl.constexpr, SMALL: tl.constexpr, DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """`E^T (C q)` of queries `b_q [BD, BM]`, `[QW, BM]` four times."""
    b_c, b_scale = load_coefficients(p_page, i_h, o_coef, o_coef_scale, M, MC, D, BD, SMALL, DTYPE)
    # 8 bits are exact in fp16.
    b_y = tl.dot(signed(b_c, ASM), b_q) if SMALL else dot_exact(b_c, b_q)
    b_y *= b_scale[:, None]  # [MC, BM]
    b_s0 = tl.zeros([QW, BM], tl.float32)
    b_s1, b_s2, b_s3 = b_s0, b_s0, b_s0
    o_m = tl.arange(0, MC)[:, None]
    p_e = p_basis + tl.arange(0, QW)
    for i_j in range(M):
        b_yj = tl.sum(tl.where(o_m == i_j, b_y, 0.0), 0)[None, :]
        b_s0 += tl.load(p_e)[:, None] * b_yj
        b_s1 += tl.load(p_e + QW)[:, None] * b_yj
        b_s2 += tl.load(p_e + 2 * QW)[:, None] * b_yj
        b_s3 += tl.load(p_e + 3 * QW)[:, None] * b_yj
        p_e += 4 * QW
    return b_s0, b_s1, b_s2, b_s3


@triton.jit
def column_scores(
    b_s0, b_s1, b_s2, b_s3, p_q, o_row, m_row, q_scale, p_page, i_h,
    p_column_start, p_column_dim, p_column_coded, p_column_level,
    o_codes, o_scale, o_zero, QW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Add `codes . (scale * q) + (zero . q)`."""
    o_j = tl.arange(0, QW)
    start, stop = tl.load(p_column_start + i_h), tl.load(p_column_start + i_h + 1)
    b_zeros = tl.zeros([BN, BM], tl.float32)
    for i_n in range(start, stop, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < stop
        b_dim, b_scale, b_zero = load_channel(
            p_column_dim, p_page, o_n, m_n, p_column_coded, p_column_level, o_scale, o_zero
        )
        m_q = m_n[:, None] & m_row[None, :]
        b_q = tl.load(p_q + o_row[None, :] + b_dim[:, None], mask=m_q, other=0.0)
        b_q = b_q.to(tl.float32) * q_scale
        b_zeros += b_q * b_zero[:, None]
        b_q *= b_scale[:, None]
        b_q = tl.minimum(tl.maximum(b_q, -FP16_MAX), FP16_MAX).to(tl.float16)
        o_b = o_n[None, :] * QW + o_j[:, None]
        b_b = tl.load(p_page + o_codes + o_b, mask=m_n[None, :], other=0)
        b_s0 = tl.dot(codes(b_b, 0, ASM), b_q, b_s0)
        b_s1 = tl.dot(codes(b_b, 2, ASM), b_q, b_s1)
        b_s2 = tl.dot(codes(b_b, 4, ASM), b_q, b_s2)
        b_s3 = tl.dot(codes(b_b, 6, ASM), b_q, b_s3)
    b_zero = tl.sum(b_zeros, 0)[None, :]
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
        m_q = m_n[:, None] & m_row[None, :]
        b_q = tl.load(p_q + o_row[None, :] + b_dim[:, None], mask=m_q, other=0.0)
        b_q = b_q.to(tl.float32) * q_scale
        p_k = p_raw + o_n[None, :] * (4 * QW) + o_j[:, None]
        m_k = m_n[None, :]
        b_s0 += dot_exact(tl.load(p_k, mask=m_k, other=0.0), b_q)
        b_s1 += dot_exact(tl.load(p_k + QW, mask=m_k, other=0.0), b_q)
        b_s2 += dot_exact(tl.load(p_k + 2 * QW, mask=m_k, other=0.0), b_q)
        b_s3 += dot_exact(tl.load(p_k + 3 * QW, mask=m_k, other=0.0), b_q)
    return b_s0, b_s1, b_s2, b_s3


@triton.jit
def scale_weights(b_zeros, b_p, p_page, o_t, o_scale, o_zero):
    """Weights `b_p [QW, BM]` times the tokens' scales; `b_zeros` gathers what their zeros add to each dim."""
    b_scale = load_fp16(p_page + o_scale, o_t, o_t >= 0).to(tl.float32)
    b_zero = load_fp16(p_page + o_zero, o_t, o_t >= 0).to(tl.float32)
    return b_zeros + b_p * b_zero[:, None], b_p * b_scale[:, None]


@triton.jit
def high_bits(b_acc, b_v, b_p, i_s: tl.constexpr, QW: tl.constexpr, ASM: tl.constexpr):
    """Add slice `i_s` of a bit plane in eighths of the page, two of which make a slice."""
    b_bit = 1 << (2 * i_s + tl.arange(0, QW) // (QW // 2))
    b_w = (b_p * (4.0 / b_bit.to(tl.float32))[:, None]).to(tl.float16)
    return tl.dot(masked(b_v, b_bit.to(tl.uint8)[None, :], ASM), b_w, b_acc)


@triton.jit
def token_values(
    b_acc, b_zeros, b_p0, b_p1, b_p2, b_p3, p_page, i_h, H, o_codes, o_high, o_scale, o_zero,
    D: tl.constexpr, BD: tl.constexpr, QW: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Add V of the token codec, rotated: `[BD, W]` times weights `[QW, BM]` of the four slices."""
    o_j = tl.arange(0, QW)
    o_d = tl.arange(0, BD)
    m_d = (o_d < D)[:, None]
    o_t = i_h * 4 * QW + o_j
    if BITS == 16:
        p_v = (p_page + o_codes).to(tl.pointer_type(DTYPE)) + o_t[None, :] * D + o_d[:, None]
        b_acc += dot_exact(tl.load(p_v, mask=m_d, other=0.0), b_p0)
        b_acc += dot_exact(tl.load(p_v + QW * D, mask=m_d, other=0.0), b_p1)
        b_acc += dot_exact(tl.load(p_v + 2 * QW * D, mask=m_d, other=0.0), b_p2)
        b_acc += dot_exact(tl.load(p_v + 3 * QW * D, mask=m_d, other=0.0), b_p3)
    else:
        b_zeros, b_p0 = scale_weights(b_zeros, b_p0, p_page, o_t, o_scale, o_zero)
        b_zeros, b_p1 = scale_weights(b_zeros, b_p1, p_page, o_t + QW, o_scale, o_zero)
        b_zeros, b_p2 = scale_weights(b_zeros, b_p2, p_page, o_t + 2 * QW, o_scale, o_zero)
        b_zeros, b_p3 = scale_weights(b_zeros, b_p3, p_page, o_t + 3 * QW, o_scale, o_zero)
        for i_level in tl.static_range(BITS // 2):
            o_v = ((i_level * H + i_h) * QW + o_j)[None, :] * D + o_d[:, None]
            b_v = tl.load(p_page + o_codes + o_v, mask=m_d, other=0)
            b_acc = tl.dot(codes(b_v, 0, ASM), (b_p0 * (4**i_level)).to(tl.float16), b_acc)
            b_acc = tl.dot(codes(b_v, 2, ASM), (b_p1 * (4**i_level)).to(tl.float16), b_acc)
            b_acc = tl.dot(codes(b_v, 4, ASM), (b_p2 * (4**i_level)).to(tl.float16), b_acc)
            b_acc = tl.dot(codes(b_v, 6, ASM), (b_p3 * (4**i_level)).to(tl.float16), b_acc)
        if BITS == 3:
            EW: tl.constexpr = QW // 2
            o_v = (i_h * EW + o_j % EW)[None, :] * D + o_d[:, None]
            b_v = tl.load(p_page + o_high + o_v, mask=m_d, other=0)
            b_acc = high_bits(b_acc, b_v, b_p0, 0, QW, ASM)
            b_acc = high_bits(b_acc, b_v, b_p1, 1, QW, ASM)
            b_acc = high_bits(b_acc, b_v, b_p2, 2, QW, ASM)
            b_acc = high_bits(b_acc, b_v, b_p3, 3, QW, ASM)
    return b_acc, b_zeros


@triton.jit
def dot_slices(p_x, m_x, QW: tl.constexpr, b_p0, b_p1, b_p2, b_p3):
    """Rows of W elements at `p_x [n, QW]` times the weights of all four slices."""
    b_x = dot_exact(tl.load(p_x, mask=m_x, other=0.0), b_p0)
    b_x += dot_exact(tl.load(p_x + QW, mask=m_x, other=0.0), b_p1)
    b_x += dot_exact(tl.load(p_x + 2 * QW, mask=m_x, other=0.0), b_p2)
    b_x += dot_exact(tl.load(p_x + 3 * QW, mask=m_x, other=0.0), b_p3)
    return b_x


@triton.jit
def channel_values(
    b_acc, b_p0, b_p1, b_p2, b_p3, p_basis, p_page, i_h,
    p_column_start, p_column_dim, p_column_coded, p_column_level, p_raw_start, p_raw_dim,
    o_coef, o_coef_scale, o_raw, o_codes, o_scale, o_zero,
    M, MC: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, QW: tl.constexpr, BN: tl.constexpr,
    SMALL: tl.constexpr, HAS_CODES: tl.constexpr, HAS_RAW: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Add V of the channel codec: `C^T (E p)`, codes and raw dims, put in place by one-hot products."""
    o_j = tl.arange(0, QW)
    o_d = tl.arange(0, BD)
    if MC > 0:
        o_m = tl.arange(0, MC)
        p_e = p_basis + o_m[:, None] * (4 * QW) + o_j[None, :]
        b_y = dot_slices(p_e, (o_m < M)[:, None], QW, b_p0, b_p1, b_p2, b_p3)
        b_c, b_worth = load_coefficients(
            p_page, i_h, o_coef, o_coef_scale, M, MC, D, BD, SMALL, DTYPE
        )
        b_acc += dot_exact(tl.trans(b_c), b_y * b_worth[:, None])
    if HAS_RAW:
        start, stop = tl.load(p_raw_start + i_h), tl.load(p_raw_start + i_h + 1)
        p_raw = (p_page + o_raw).to(tl.pointer_type(DTYPE))
        for i_n in range(start, stop, BN):
            o_n = i_n + tl.arange(0, BN)
            m_n = o_n < stop
            b_dim = tl.load(p_raw_dim + o_n, mask=m_n, other=-1)
            p_v = p_raw + o_n[:, None] * (4 * QW) + o_j[None, :]
            b_x = dot_slices(p_v, m_n[:, None], QW, b_p0, b_p1, b_p2, b_p3)
            b_acc += dot_exact(o_d[:, None] == b_dim[None, :], b_x)
    if HAS_CODES:
        start, stop = tl.load(p_column_start + i_h), tl.load(p_column_start + i_h + 1)
        b_sum = tl.sum(b_p0 + b_p1 + b_p2 + b_p3, 0)
        for i_n in range(start, stop, BN):
            o_n = i_n + tl.arange(0, BN)
            m_n = o_n < stop
            b_dim, b_scale, b_zero = load_channel(
                p_column_dim, p_page, o_n, m_n, p_column_coded, p_column_level, o_scale, o_zero
            )
            o_b = o_n[:, None] * QW + o_j[None, :]
            b_b = tl.load(p_page + o_codes + o_b, mask=m_n[:, None], other=0)
            b_x = dot_exact(b_b & 3, b_p0)
            b_x += dot_exact((b_b >> 2) & 3, b_p1)
            b_x += dot_exact((b_b >> 4) & 3, b_p2)
            b_x += dot_exact(b_b >> 6, b_p3)
            b_x = b_x * b_scale[:, None] + b_sum[None, :] * b_zero[:, None]
            b_acc += dot_exact(o_d[:, None] == b_dim[None, :], b_x)
    return b_acc
