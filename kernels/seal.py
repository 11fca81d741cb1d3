"""Seals the pages that a step completes: raw K and V in, bytes of `page.py` out, one launch a layer.

A program takes one page, KV head and tensor (K or V). Which pages are complete is read from the lengths
on the device; where none is, programs end at once. Shapes: W tokens, BD dims, ET tokens of each eighth of
a page, so that packing finds all tokens of a byte in one tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fourier_vllm.kernels.codecs import range_share
from fourier_vllm.kernels.codecs_fragments import run_of
from fourier_vllm.kernels.page_attention import FP16_MAX
from fourier_vllm.kernels.rounding import round_half_up, step_of, store_fp16, to_fp16
from fourier_vllm.kernels.seal_fragments import seal_columns, seal_rotated
from fourier_vllm.kernels.split import TL_DTYPES
from fourier_vllm.kernels.tables import Tables, next_power_of_2


@triton.jit
def load_tokens(
    o_t, o_d, p_new, p_local, p_table, i_h, is_v, start, context, stride_new, stride_block,
    stride_head, stride_token, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Dims `o_d` of tokens at positions `o_t [n]`, from this step or the local cache, float32."""
    m_d = (o_d < D)[None, :]
    m_new = o_t >= context
    o_x = (start + o_t - context).to(tl.int64) * stride_new + i_h * D
    b_new = tl.load(p_new + o_x[:, None] + o_d[None, :], mask=m_new[:, None] & m_d, other=0.0)
    block = tl.load(p_table + o_t // BLOCK, mask=~m_new, other=0).to(tl.int64)
    o_l = block * stride_block + i_h * stride_head + (o_t % BLOCK) * stride_token + is_v * D
    b_old = tl.load(p_local + o_l[:, None] + o_d[None, :], mask=~m_new[:, None] & m_d, other=0.0)
    return tl.where(m_new[:, None], b_new.to(tl.float32), b_old.to(tl.float32))


@triton.jit
def without_pinned(b_x, o_w, num_pinned, b_mean):
    """Pinned tokens are read raw: their outsized keys shall cost no precision."""
    return tl.where((o_w < num_pinned)[:, None], b_mean[None, :], b_x)


@triton.jit
def mean_of_others(b_x, num_pinned, W: tl.constexpr):
    o_w = tl.arange(0, W)
    b_sum = tl.sum(tl.where((o_w >= num_pinned)[:, None], b_x, 0.0), 0)
    return b_sum / tl.maximum(W - num_pinned, 1).to(tl.float32)


@triton.jit
def load_page(
    i_p, num_pinned, p_new, p_local, p_table, i_h, is_v, start, context, stride_new, stride_block,
    stride_head, stride_token, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A page without its pinned tokens, `[W, BD]` float32."""
    o_w = tl.arange(0, W)
    b_x = load_tokens(i_p * W + o_w, tl.arange(0, BD), p_new, p_local, p_table, i_h, is_v, start,
                      context, stride_new, stride_block, stride_head, stride_token, D,
                      BLOCK)  # fmt: skip
    return without_pinned(b_x, o_w, num_pinned, mean_of_others(b_x, num_pinned, W))


@triton.jit
def packed(b_codes, BITS: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr):
    """Codes `[ROWS, BD]` of 1 or 2 bits to bytes `[ROWS * BITS / 8, BD]`, runs of rows side by side."""
    N: tl.constexpr = 8 // BITS
    b_runs = tl.reshape(b_codes, (N, ROWS // N, BD))
    return tl.sum(b_runs << (tl.arange(0, N) * BITS)[:, None, None], 0).to(tl.uint8)


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
            scale = tl.minimum(tl.max(tl.abs(b_c), 0) / 127, FP16_MAX).to(tl.float16)
            b_c = tl.minimum(tl.maximum(round_half_up(b_c / step_of(scale)), -127.0), 127.0)
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
    b_low = tl.min(tl.where(m_d, b_x, float("inf")), 1)
    b_high = tl.max(tl.where(m_d, b_x, -float("inf")), 1)
    b_cut = (b_high - b_low) * ((1.0 - SHARE) / 2)
    b_zero = to_fp16(b_low + b_cut)
    b_scale = (b_high - b_cut - b_zero.to(tl.float32)) / ((1 << BITS) - 1)
    b_scale = to_fp16(tl.maximum(b_scale, 0.0))
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


@triton.jit
def seal_kernel(
    p_k, p_v, p_local, p_local_table, p_pages, p_page_table, p_seq_lens, p_query_start,
    p_basis, p_signs, p_k_dims, p_v_dims, p_column_start, p_column_dim,
    ok_coef, ok_coef_scale, ok_raw, ok_codes, ok_scale, ok_zero,
    ov_coef, ov_coef_scale, ov_raw, ov_codes, ov_scale, ov_zero, ov_high,
    stride_k, stride_v, stride_block, stride_head, stride_token, stride_local_table,
    stride_page, stride_page_table, signs_scale, S, M,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, ET: tl.constexpr,
    BK: tl.constexpr, BLOCK: tl.constexpr, V_BITS: tl.constexpr, SHARE: tl.constexpr, DTYPE: tl.constexpr,
    K_SMALL: tl.constexpr, K_CODES: tl.constexpr, K_RAW: tl.constexpr,
    V_SMALL: tl.constexpr, V_CODES: tl.constexpr, V_RAW: tl.constexpr,
    FRAGMENTS: tl.constexpr, MEANS: tl.constexpr, EV: tl.constexpr, EH: tl.constexpr,
):  # fmt: skip
    i_h, is_v, i_b = tl.program_id(0) // 2, tl.program_id(0) % 2, tl.program_id(2)
    start, seq_len = tl.load(p_query_start + i_b), tl.load(p_seq_lens + i_b)
    context = seq_len - (tl.load(p_query_start + i_b + 1) - start)
    i_p = context // W + tl.program_id(1)
    if (i_p + 1) * W > seq_len:
        return
    page = tl.load(p_page_table + i_b.to(tl.int64) * stride_page_table + i_p).to(tl.int64)
    p_page = p_pages + page * stride_page
    p_table = p_local_table + i_b.to(tl.int64) * stride_local_table
    o_w, o_d = tl.arange(0, W), tl.arange(0, BD)
    num_pinned = tl.minimum(tl.maximum(S - i_p * W, 0), W)
    if is_v == 0:
        b_x = load_page(i_p, num_pinned, p_k, p_local, p_table, i_h, 0, start, context, stride_k,
                        stride_block, stride_head, stride_token, D, BD, W, BLOCK)  # fmt: skip
        if FRAGMENTS:
            seal_columns(b_x, p_page, i_h, p_basis, p_k_dims, p_column_start, p_column_dim,
                         ok_coef, ok_coef_scale, ok_codes, ok_scale, ok_zero, M, H, D, BD, W,
                         MEANS)  # fmt: skip
        else:
            seal_channel(b_x, p_page, i_h, p_basis, p_k_dims, ok_coef, ok_coef_scale, ok_raw,
                         ok_codes, ok_scale, ok_zero, M, H, D, BD, W, K_SMALL, K_CODES, K_RAW,
                         DTYPE)  # fmt: skip
    elif V_BITS == 0:
        b_x = load_page(i_p, num_pinned, p_v, p_local, p_table, i_h, 1, start, context, stride_v,
                        stride_block, stride_head, stride_token, D, BD, W, BLOCK)  # fmt: skip
        seal_channel(b_x, p_page, i_h, p_basis, p_v_dims, ov_coef, ov_coef_scale, ov_raw,
                     ov_codes, ov_scale, ov_zero, M, H, D, BD, W, V_SMALL, V_CODES, V_RAW,
                     DTYPE)  # fmt: skip
    else:
        o_r = tl.arange(0, 8 * ET)
        for i_e in range(0, W // 8, ET):
            o_t = (o_r // ET) * (W // 8) + i_e + o_r % ET
            if FRAGMENTS:
                o_t = (o_r // (2 * ET)) * (W // 4) + 2 * i_e + o_r % (2 * ET)
            b_turned = tl.zeros([8 * ET, BD], tl.float32)
            for i_k in range(0, BD, BK):
                o_k = i_k + tl.arange(0, BK)
                b_x = load_tokens(i_p * W + o_t, o_k, p_v, p_local, p_table, i_h, 1, start,
                                  context, stride_v, stride_block, stride_head, stride_token, D,
                                  BLOCK)  # fmt: skip
                if num_pinned > 0:
                    b_all = load_tokens(i_p * W + o_w, o_k, p_v, p_local, p_table, i_h, 1, start,
                                        context, stride_v, stride_block, stride_head,
                                        stride_token, D, BLOCK)  # fmt: skip
                    b_mean = mean_of_others(b_all, num_pinned, W)
                    b_x = without_pinned(b_x, o_t, num_pinned, b_mean)
                if V_BITS == 16:
                    p_codes = (p_page + ov_codes).to(tl.pointer_type(DTYPE))
                    o_v = (i_h * W + o_t)[:, None] * D + o_k[None, :]
                    tl.store(p_codes + o_v, b_x.to(DTYPE), mask=(o_k < D)[None, :])
                else:
                    b_r = tl.load(p_signs + o_k[:, None] * BD + o_d[None, :])
                    b_turned = tl.dot(b_x, b_r, b_turned, input_precision="tf32")
            if FRAGMENTS:
                seal_rotated(b_turned * signs_scale, i_e // ET, p_page, i_h, ov_codes, ov_high,
                             ov_scale, ov_zero, H, D, BD, W, V_BITS, SHARE, EV, EH)  # fmt: skip
            elif V_BITS < 16:
                seal_tokens(b_turned * signs_scale, o_t, i_e, p_page, i_h, ov_codes, ov_high,
                            ov_scale, ov_zero, H, D, BD, W, ET, V_BITS, SHARE)  # fmt: skip


def seal(
    tables: Tables,
    k: Tensor,
    v: Tensor,
    local: Tensor,
    local_table: Tensor,
    pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    max_query_len: int,
    sink_tokens: int,
) -> None:
    """Seal every page whose last token is in this step.

    Parameters
    ----------
    k, v : Tensor [T, H, D]
        Tokens of this step, keys after RoPE; heads of a row contiguous.
    local : Tensor [blocks, H, block_size, 2 * D]
        The local cache, with the tokens of a page that came before this step.
    local_table, page_table : Tensor [B, max_blocks], [B, max_pages], int32
        By position, and by index of the page.
    pages : Tensor [blocks, page_bytes], uint8
        Written in place.
    seq_lens, query_start_loc : Tensor [B], [B + 1], int32
        Tokens of each request, this step included, and where its own begin in `k` and `v`.
    """
    layout, kt, vt = tables.layout, tables.k, tables.v
    H, W, D, m = layout.num_kv_heads, layout.page_size, layout.head_size, layout.coefficients
    grid = (2 * H, triton.cdiv(max_query_len, W), len(seq_lens))
    seal_kernel[grid](
        k, v, local, local_table, pages, page_table, seq_lens, query_start_loc,
        tables.basis, tables.signs, kt.dims, vt.dims, kt.column_start, kt.column_dim, *kt.offsets, *tables.v_offsets,
        k.stride(0), v.stride(0), *local.stride()[:3], local_table.stride(0),
        pages.stride(0), page_table.stride(0), tables.signs_scale, sink_tokens, max(m - 1, 0) if layout.fragments else m,
        H=H, D=D, BD=next_power_of_2(D), W=W, ET=8,
        BK=min(64, next_power_of_2(D)),
        BLOCK=local.shape[2], V_BITS=tables.v_bits, SHARE=range_share(tables.v_bits),
        DTYPE=TL_DTYPES[k.dtype],
        K_SMALL=kt.small_coefficients, K_CODES=kt.has_codes, K_RAW=kt.has_raw,
        V_SMALL=vt.small_coefficients, V_CODES=vt.has_codes, V_RAW=vt.has_raw,
        FRAGMENTS=layout.fragments, MEANS=m > 0, EV=run_of(D // 8), EH=run_of(max(D // 16, 1)),
        num_warps=8, num_stages=1,
    )  # fmt: skip
