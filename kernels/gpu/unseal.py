"""Lays the keys and values of prompts out token after token, for attention that knows no pages.

A program takes K or V of one head for the tokens of one page: rebuilt from the page where it is read, else
copied from the local cache or from this step. Shapes: W tokens a page in four slices of QW = W/4, BD dims.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fourier_vllm.kernels.gpu.operands_plain import load_fp16
from fourier_vllm.kernels.gpu.seal import load_tokens
from fourier_vllm.kernels.gpu.seal_fragments import swapped
from fourier_vllm.kernels.gpu.split import BATCH_POINTERS, TL_DTYPES
from fourier_vllm.kernels.gpu.step import Layer, Step
from fourier_vllm.kernels.gpu.tables import next_power_of_2
from fourier_vllm.page import run_of


@triton.jit
def code_words(
    p_codes, p_dims, i_h, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr,
    FRAGMENTS: tl.constexpr,
):  # fmt: skip
    """Bytes of up to four columns of each dim, the lowest first, `[QW, BD]`."""
    o_j, o_d = tl.arange(0, W // 4), tl.arange(0, BD)
    p_dim = p_dims + i_h * D + o_d
    b_first = tl.load(p_dim + 2 * H * D, mask=o_d < D, other=-1)
    b_bits = tl.load(p_dim, mask=b_first >= 0, other=0)
    b_w = tl.zeros([W // 4, BD], tl.int32)
    for i_level in tl.static_range(4):
        o_n = b_first + i_level
        if FRAGMENTS:
            o_b = (o_n // 4 * W + swapped(o_n % 4))[None, :]
            o_b += ((o_j % 8 * (W // 32) + o_j // 8) * 4)[:, None]
        else:
            o_b = (o_n * (W // 4))[None, :] + o_j[:, None]
        b_b = tl.load(p_codes + o_b, mask=(b_bits > 2 * i_level)[None, :], other=0)
        b_w |= b_b.to(tl.int32) << (8 * i_level)
    return b_w


@triton.jit
def codes_in_words(b_w, i_n, LEVELS: tl.constexpr):
    """Codes of slice `i_n` from words of bytes, int32."""
    b_x = (b_w >> (2 * i_n)) & 3
    for i_level in tl.static_range(1, LEVELS):
        b_x |= ((b_w >> (8 * i_level + 2 * i_n)) & 3) << (2 * i_level)
    return b_x


@triton.jit
def unseal_channel(
    i_n, p_page, p_basis, p_dims, i_h, b_w, o_coef, o_coef_scale, o_raw, o_scale, o_zero, M,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, SMALL: tl.constexpr,
    CODES: tl.constexpr, RAW: tl.constexpr, FRAGMENTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Slice `i_n` of a tensor of the channel codec, whose codes are in `b_w`, `[QW, BD]` float32."""
    o_t, o_d = i_n * (W // 4) + tl.arange(0, W // 4), tl.arange(0, BD)
    m_d = o_d < D
    b_x = tl.zeros([W // 4, BD], tl.float32)
    for i_m in range(M):
        o_c = (i_h * M + i_m) * D
        if FRAGMENTS:
            b_c = tl.load(p_page + o_coef + o_c + swapped(o_d), mask=m_d, other=128)
            b_c = b_c.to(tl.float32) - 128.0
        elif SMALL:
            p_c = (p_page + o_coef).to(tl.pointer_type(tl.int8))
            b_c = tl.load(p_c + o_c + o_d, mask=m_d, other=0).to(tl.float32)
        else:
            p_c = (p_page + o_coef).to(tl.pointer_type(DTYPE))
            b_c = tl.load(p_c + o_c + o_d, mask=m_d, other=0.0).to(tl.float32)
        if SMALL:
            b_c *= load_fp16(p_page + o_coef_scale, i_h * M + i_m, True).to(tl.float32)
        b_x += tl.load(p_basis + i_m * W + o_t)[:, None] * b_c[None, :]
    p_dim = p_dims + i_h * D + o_d
    if FRAGMENTS:
        b_x += load_fp16(p_page + o_zero, i_h * D + o_d, m_d).to(tl.float32)[None, :]
    if CODES:
        b_coded = tl.load(p_dim + H * D, mask=m_d, other=-1)
        o_s = tl.load(p_dim + 2 * H * D, mask=m_d, other=-1) if FRAGMENTS else b_coded
        b_scale = load_fp16(p_page + o_scale, o_s, b_coded >= 0).to(tl.float32)
        b_x += codes_in_words(b_w, i_n, 4).to(tl.float32) * b_scale[None, :]
        if not FRAGMENTS:
            b_zero = load_fp16(p_page + o_zero, b_coded, b_coded >= 0).to(tl.float32)
            b_x += b_zero[None, :]
    if RAW:
        b_raw = tl.load(p_dim + 3 * H * D, mask=m_d, other=-1)
        p_x = (p_page + o_raw).to(tl.pointer_type(DTYPE)) + b_raw[None, :] * W + o_t[:, None]
        b_y = tl.load(p_x, mask=(b_raw >= 0)[None, :], other=0.0).to(tl.float32)
        b_x = tl.where((b_raw >= 0)[None, :], b_y, b_x)
    return b_x


@triton.jit
def row_byte(o_j, o_d, D: tl.constexpr, E: tl.constexpr, PER: tl.constexpr):
    """Where byte `o_j [QW]` of dims `o_d` lies in fragment order, `PER` dims a byte's place."""
    o_i = o_d // PER
    o_k = (o_j // 16)[:, None] * (D // (PER * E)) + (o_i // E)[None, :]
    o_k = (o_k * 4 + (o_j % 16 // 4)[:, None]) * 8 + (o_d % 8)[None, :]
    return (o_k * E + (o_i % E)[None, :]) * 4 + swapped(o_j % 4)[:, None]


@triton.jit
def unseal_tokens(
    i_n, p_page, p_rotation, i_h, o_codes, o_high, o_scale, o_zero,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, W: tl.constexpr,
    BITS: tl.constexpr, EV: tl.constexpr, EH: tl.constexpr, FRAGMENTS: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Slice `i_n` of V of the token codec, `[QW, BD]` float32."""
    QW: tl.constexpr = W // 4
    o_j, o_d = tl.arange(0, QW), tl.arange(0, BD)
    o_t = i_n * QW + o_j
    if BITS == 16:
        p_x = (p_page + o_codes).to(tl.pointer_type(DTYPE)) + (i_h * W + o_t)[:, None] * D
        b_out = tl.load(p_x + o_d[None, :], mask=(o_d < D)[None, :], other=0.0).to(tl.float32)
    else:
        o_s = i_h * W + (o_j % 8 * 4 + i_n) * (W // 32) + o_j // 8 if FRAGMENTS else i_h * W + o_t
        b_scale = load_fp16(p_page + o_scale, o_s, True).to(tl.float32)
        b_zero = load_fp16(p_page + o_zero, o_s, True).to(tl.float32)
        b_out = tl.zeros([QW, BD], tl.float32)
        for i_k in range(0, BD, BK):
            o_k = i_k + tl.arange(0, BK)
            m_k = (o_k < D)[None, :]
            o_b = row_byte(o_j, o_k, D, EV, 8) if FRAGMENTS else o_j[:, None] * D + o_k[None, :]
            b_w = tl.zeros([QW, BK], tl.int32)
            for i_level in tl.static_range(BITS // 2):
                p_b = p_page + o_codes + (i_level * H + i_h) * (QW * D) + o_b
                b_w |= tl.load(p_b, mask=m_k, other=0).to(tl.int32) << (8 * i_level)
            b_x = codes_in_words(b_w, i_n, BITS // 2)
            if BITS == 3:
                if FRAGMENTS:
                    o_b = row_byte(o_j, o_k, D, EH, 16)
                    b_bit = 2 * i_n + (o_k % 16 // 8)[None, :]
                else:
                    o_b = (o_j % (QW // 2))[:, None] * D + o_k[None, :]
                    b_bit = 2 * i_n + (o_j // (QW // 2))[:, None]
                p_b = p_page + o_high + i_h * (QW // 2 * D) + o_b
                b_high = tl.load(p_b, mask=m_k, other=0).to(tl.int32)
                b_x += ((b_high >> b_bit) & 1) * 4
            b_y = b_x.to(tl.float32) * b_scale[:, None] + b_zero[:, None]
            b_r = tl.load(p_rotation + o_d[None, :] * BD + o_k[:, None])
            b_out = tl.dot(b_y, b_r, b_out, input_precision="tf32x3")
    return b_out


@triton.jit(
    do_not_specialize=["S", "M", "first_row", "begin", "stride_local_table", "stride_page_table"],
    do_not_specialize_on_alignment=BATCH_POINTERS,
)
def unseal_kernel(
    p_k, p_v, p_local, p_local_table, p_pages, p_page_table, p_seq_lens, p_query_start, p_num_pages,
    p_starts, p_k_out, p_v_out, p_basis, p_rotation, p_k_dims, p_v_dims,
    ok_coef, ok_coef_scale, ok_raw, ok_codes, ok_scale, ok_zero,
    ov_coef, ov_coef_scale, ov_raw, ov_codes, ov_scale, ov_zero, ov_high,
    stride_k, stride_v, stride_block, stride_head, stride_token, stride_local_table,
    stride_page, stride_page_table, S, M, first_row, begin,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr, V_BITS: tl.constexpr, DTYPE: tl.constexpr,
    K_SMALL: tl.constexpr, K_CODES: tl.constexpr, K_RAW: tl.constexpr,
    V_SMALL: tl.constexpr, V_CODES: tl.constexpr, V_RAW: tl.constexpr,
    FRAGMENTS: tl.constexpr, EV: tl.constexpr, EH: tl.constexpr,
):  # fmt: skip
    """Lay out K or V of one head for the tokens of one page of one request. Grid: (pages, n, 2 H)."""
    QW: tl.constexpr = W // 4
    i_p, i_y, i_x = begin // W + tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, i_h, is_v = first_row + i_y, i_x // 2, i_x % 2
    row = tl.load(p_starts + i_y)
    end = begin + tl.load(p_starts + i_y + 1) - row
    if i_p * W >= end:
        return
    start = tl.load(p_query_start + i_b)
    seq_len = tl.load(p_seq_lens + i_b)
    context = seq_len - (tl.load(p_query_start + i_b + 1) - start)
    is_page = i_p < tl.load(p_num_pages + i_b)
    p_table = p_local_table + i_b.to(tl.int64) * stride_local_table
    page = tl.load(p_page_table + i_b.to(tl.int64) * stride_page_table + i_p).to(tl.int64)
    p_page = p_pages + tl.where(is_page, page, 0) * stride_page
    o_j, o_d = tl.arange(0, QW), tl.arange(0, BD)
    b_words = tl.zeros([QW, BD], tl.int32)
    if is_page:
        if is_v == 0:
            if K_CODES:
                b_words = code_words(p_page + ok_codes, p_k_dims, i_h, H, D, BD, W, FRAGMENTS)
        elif V_BITS == 0 and V_CODES:
            b_words = code_words(p_page + ov_codes, p_v_dims, i_h, H, D, BD, W, False)
    for i_n in range(4):
        o_t = i_p * W + i_n * QW + o_j
        b_x = tl.zeros([QW, BD], tl.float32)
        if is_page:
            if is_v == 0:
                b_x = unseal_channel(i_n, p_page, p_basis, p_k_dims, i_h, b_words, ok_coef,
                                     ok_coef_scale, ok_raw, ok_scale, ok_zero, M, H, D, BD, W,
                                     K_SMALL, K_CODES, K_RAW, FRAGMENTS, DTYPE)  # fmt: skip
            elif V_BITS == 0:
                b_x = unseal_channel(i_n, p_page, p_basis, p_v_dims, i_h, b_words, ov_coef,
                                     ov_coef_scale, ov_raw, ov_scale, ov_zero, M, H, D, BD, W,
                                     V_SMALL, V_CODES, V_RAW, False, DTYPE)  # fmt: skip
            else:
                b_x = unseal_tokens(i_n, p_page, p_rotation, i_h, ov_codes, ov_high, ov_scale,
                                    ov_zero, H, D, BD, BK, W, V_BITS, EV, EH, FRAGMENTS, DTYPE)  # fmt: skip
        if not is_page or i_p * W < S:
            p_new, stride_new = p_k, stride_k
            if is_v == 1:
                p_new, stride_new = p_v, stride_v
            # Tokens that are not there are the last one.
            b_raw = load_tokens(tl.minimum(o_t, seq_len - 1), o_d, i_p * W >= context, p_new, p_local,
                                p_table, i_h, is_v, start, context, stride_new, stride_block,
                                stride_head, stride_token, D, BLOCK)  # fmt: skip
            m_raw = (o_t < S)[:, None] | (not is_page)
            b_x = tl.where(m_raw, b_raw, b_x)
        o_x = ((row + o_t - begin).to(tl.int64) * H + i_h) * D
        p_out = p_k_out
        if is_v == 1:
            p_out = p_v_out
        m_x = (o_t < end)[:, None] & (o_d < D)[None, :]
        tl.store(p_out + o_x[:, None] + o_d[None, :], b_x.to(p_out.dtype.element_ty), mask=m_x)


def unseal(
    layer: Layer,
    step: Step,
    k: Tensor,
    v: Tensor,
    first_row: int,
    begin: int,
    max_len: int,
    starts: Tensor,
    k_out: Tensor,
    v_out: Tensor,
) -> None:
    """Write tokens of the n requests from `first_row` on to `k_out, v_out`, each from its token `begin` on.

    The sinks, and tokens behind the first `Step.num_pages` pages, are taken as they are.

    Parameters
    ----------
    k, v : Tensor [T, H, D]
        Tokens of this step; heads of a row contiguous.
    begin, max_len : int
        A multiple of the page size, and tokens of a request, at most.
    starts : Tensor [n + 1], int32
        Where each request's rows begin in the outputs, and the end.
    k_out, v_out : Tensor [T, H, D], contiguous
    """
    tables, _, _, pages, local = layer
    seq_lens, query_start_loc, page_table, local_table, _, num_pages, *_ = step
    layout, kt, vt = tables.layout, tables.k, tables.v
    H, W, D = layout.num_kv_heads, layout.page_size, layout.head_size
    BD = next_power_of_2(D)
    unseal_kernel[(triton.cdiv(max_len, W), len(starts) - 1, 2 * H)](
        k, v, local, local_table, pages, page_table, seq_lens, query_start_loc, num_pages,
        starts, k_out, v_out, tables.basis, tables.rotation, kt.dims, vt.dims,
        *kt.offsets, *tables.v_offsets,
        k.stride(0), v.stride(0), *local.stride()[:3], local_table.stride(0),
        pages.stride(0), page_table.stride(0), step.window.sink_tokens,
        tables.num_rows, first_row, begin,
        H=H, D=D, BD=BD, BK=min(64, BD), W=W, BLOCK=local.shape[2], V_BITS=tables.v_bits,
        DTYPE=TL_DTYPES[k.dtype],
        **tables.kinds(),
        FRAGMENTS=layout.fragments, EV=run_of(D // 8), EH=run_of(max(D // 16, 1)),
        num_warps=8, num_stages=1,
    )  # fmt: skip
