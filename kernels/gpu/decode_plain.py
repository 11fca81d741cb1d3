"""Split-KV attention over sealed pages in plain order (`page.py`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourier_vllm.kernels.gpu.operands_plain import (
    channel_values,
    column_scores,
    raw_scores,
    spectral_scores,
    token_values,
)
from fourier_vllm.kernels.gpu.split import (
    BATCH_POINTERS,
    LOG2_E,
    TL_DTYPES,
    pages_read,
    query_rows,
    store_empty_part,
    store_part,
)
from fourier_vllm.kernels.gpu.step import Layer, Parts, Step
from fourier_vllm.kernels.gpu.tables import MIN_ROWS, next_power_of_2


@triton.jit(
    do_not_specialize=["S", "L", "M", "splits", "num_splits", "stride_table"],
    do_not_specialize_on_alignment=BATCH_POINTERS,
)
def pages_kernel(
    p_q, p_pages, p_page_table, p_num_pages, p_gap_pages, p_seq_lens, p_query_start, p_acc, p_lse,
    p_basis,
    p_k_column_start, p_k_column_dim, p_k_column_coded, p_k_column_level, p_k_raw_start, p_k_raw_dim,
    p_v_column_start, p_v_column_dim, p_v_column_coded, p_v_column_level, p_v_raw_start, p_v_raw_dim,
    ok_coef, ok_coef_scale, ok_raw, ok_codes, ok_scale, ok_zero,
    ov_coef, ov_coef_scale, ov_raw, ov_codes, ov_scale, ov_zero, ov_high,
    stride_q, stride_page, stride_table, q_scale, S, L, M, splits, num_splits,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr,
    MC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    V_BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr,
    K_SMALL: tl.constexpr, K_CODES: tl.constexpr, K_RAW: tl.constexpr,
    V_SMALL: tl.constexpr, V_CODES: tl.constexpr, V_RAW: tl.constexpr,
):  # fmt: skip
    """Attend one share of one request's pages for a tile of its query rows.

    Grid: (tiles of BM rows times shares, H, B); the rows of a tile are the G query heads of each query token.
    Lengths are read on the device, so one grid fits every step of a shape.
    """
    QW: tl.constexpr = W // 4
    i_h, i_b = tl.program_id(1), tl.program_id(2)
    i_m, i_s = tl.program_id(0) // splits, tl.program_id(0) % splits
    start, num_queries, o_t, o_g, m_row = query_rows(p_query_start, i_b, i_h, i_m, G, BM)
    if i_m * BM >= num_queries * G:
        return
    num_pages, b_end = pages_read(p_num_pages, p_gap_pages, p_seq_lens, i_b, num_queries, o_t, L, W)
    share = tl.cdiv(num_pages, splits)
    i_row = (start + o_t).to(tl.int64) * (H * G) + o_g
    if i_s * share >= num_pages:
        store_empty_part(p_lse, i_row, m_row, i_s, num_splits)
        return
    o_row = (start + o_t).to(tl.int64) * stride_q + o_g * D
    o_d = tl.arange(0, BD)
    m_q = (o_d < D)[:, None] & m_row[None, :]
    b_q = tl.load(p_q + o_row[None, :] + o_d[:, None], mask=m_q, other=0.0)
    b_q = (b_q.to(tl.float32) * q_scale).to(tl.float16)  # [BD, BM]

    b_max = tl.full([BM], -float("inf"), tl.float32)
    # Summed over tokens once, at the end.
    b_sums = tl.zeros([QW, BM], tl.float32)
    b_zeros = tl.zeros([QW, BM], tl.float32)
    b_acc = tl.zeros([BD, BM], tl.float32)
    o_j = tl.arange(0, QW)
    for i_p in range(i_s * share, tl.minimum(num_pages, (i_s + 1) * share)):
        page = tl.load(p_page_table + i_b.to(tl.int64) * stride_table + i_p).to(tl.int64)
        p_page = p_pages + page * stride_page
        if MC > 0:
            b_s0, b_s1, b_s2, b_s3 = spectral_scores(
                b_q, p_basis, p_page, i_h, ok_coef, ok_coef_scale, M, MC, D, BD, QW, BM, K_SMALL,
                DTYPE, ASM,
            )  # fmt: skip
        else:
            b_s0 = tl.zeros([QW, BM], tl.float32)
            b_s1, b_s2, b_s3 = b_s0, b_s0, b_s0
        if K_CODES:
            b_s0, b_s1, b_s2, b_s3 = column_scores(
                b_s0, b_s1, b_s2, b_s3, p_q, o_row, m_row, q_scale, p_page, i_h,
                p_k_column_start, p_k_column_dim, p_k_column_coded, p_k_column_level,
                ok_codes, ok_scale, ok_zero, QW, BM, BN, ASM,
            )  # fmt: skip
        if K_RAW:
            b_s0, b_s1, b_s2, b_s3 = raw_scores(
                b_s0, b_s1, b_s2, b_s3, p_q, o_row, m_row, q_scale, p_page, i_h,
                p_k_raw_start, p_k_raw_dim, ok_raw, QW, BN, DTYPE,
            )  # fmt: skip
        m_s = (i_p < b_end)[None, :]
        o_w = (i_p * W + o_j)[:, None]
        b_s0 = tl.where(m_s & (o_w >= S), b_s0, -float("inf"))
        b_s1 = tl.where(m_s & (o_w + QW >= S), b_s1, -float("inf"))
        b_s2 = tl.where(m_s & (o_w + 2 * QW >= S), b_s2, -float("inf"))
        b_s3 = tl.where(m_s & (o_w + 3 * QW >= S), b_s3, -float("inf"))
        b_most = tl.maximum(tl.maximum(b_s0, b_s1), tl.maximum(b_s2, b_s3))
        b_new = tl.maximum(b_max, tl.max(b_most, 0))
        b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_old = tl.exp2(b_max - b_safe)[None, :]
        b_p0 = tl.exp2(b_s0 - b_safe[None, :])
        b_p1 = tl.exp2(b_s1 - b_safe[None, :])
        b_p2 = tl.exp2(b_s2 - b_safe[None, :])
        b_p3 = tl.exp2(b_s3 - b_safe[None, :])
        b_max = b_new
        b_sums = b_sums * b_old + (b_p0 + b_p1) + (b_p2 + b_p3)
        b_zeros *= b_old
        b_acc *= b_old
        if V_BITS > 0:
            b_acc, b_zeros = token_values(
                b_acc, b_zeros, b_p0, b_p1, b_p2, b_p3, p_page, i_h, H, ov_codes, ov_high,
                ov_scale, ov_zero, D, BD, QW, V_BITS, DTYPE, ASM,
            )  # fmt: skip
        else:
            b_acc = channel_values(
                b_acc, b_p0, b_p1, b_p2, b_p3, p_basis, p_page, i_h,
                p_v_column_start, p_v_column_dim, p_v_column_coded, p_v_column_level,
                p_v_raw_start, p_v_raw_dim, ov_coef, ov_coef_scale, ov_raw, ov_codes, ov_scale,
                ov_zero, M, MC, D, BD, QW, BN, V_SMALL, V_CODES, V_RAW, DTYPE,
            )  # fmt: skip
    b_acc += tl.sum(b_zeros, 0)[None, :]
    store_part(p_acc, p_lse, b_acc, b_max, tl.sum(b_sums, 0), i_row, m_row, i_s, num_splits, D, BD)


def attend_plain_pages(layer: Layer, step: Step, q: Tensor, parts: Parts) -> None:
    """`decode.attend_pages` for pages in plain order."""
    tables, _, scale, pages, _ = layer
    acc, lse, _, splits, _ = parts
    window, page_table, num_pages = step.window, step.page_table, step.num_pages
    _, Hq, D = q.shape
    layout = tables.layout
    H, W, m = layout.num_kv_heads, layout.page_size, layout.coefficients
    G, B = Hq // H, len(num_pages)
    rows = step.max_query_len * G
    BM = min(64, next_power_of_2(rows, MIN_ROWS))
    k, v = tables.k, tables.v
    is_small = BM <= 16 and W * D <= 128 * 128
    fits_a_warp = is_small and 0 < tables.v_bits < 16 and not k.has_raw and len(tables.basis) <= 16
    pages_kernel[(triton.cdiv(rows, BM) * splits, H, B)](
        q, pages, page_table, num_pages, step.gap_pages, step.seq_lens, step.query_start_loc, acc, lse,
        tables.basis, *k.tensors(), *v.tensors(), *k.offsets, *tables.v_offsets,
        q.stride(0), pages.stride(0), page_table.stride(0), scale * LOG2_E,
        window.sink_tokens, window.local_window, tables.num_rows, splits, acc.shape[2],
        H=H, G=G, D=D, BD=next_power_of_2(D), W=W, MC=len(tables.basis) if m else 0, BM=BM, BN=64,
        V_BITS=tables.v_bits, DTYPE=TL_DTYPES[q.dtype], ASM=q.is_cuda and torch.version.hip is None,
        **tables.kinds(),
        num_warps=1 if fits_a_warp else 4, num_stages=1,
    )  # fmt: skip
