"""Split-KV attention over sealed pages in fragment order (`page.py`), one warp a program.

Scores and weights of a page stay in registers; `operands_fragments.py` says how codes become operands.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourier_vllm.kernels.gpu.operands_fragments import (
    UNIT,
    add_basis,
    coefficient_operand,
    column_codes,
    column_operand,
    high_codes,
    lines_of,
    load_token_numbers,
    load_words,
    place_of_dim,
    prefetch,
    repeat_columns,
    row_codes,
    two_terms,
    zero_operand,
)
from fourier_vllm.kernels.gpu.split import (
    BATCH_POINTERS,
    LOG2_E,
    pages_read,
    query_rows,
    store_empty_part,
    store_part,
)
from fourier_vllm.kernels.gpu.step import Layer, Parts, Step
from fourier_vllm.kernels.gpu.tables import MIN_ROWS, next_power_of_2
from fourier_vllm.page import run_of


@triton.jit
def page_scores(
    b_q, b_bias, p_query, p_words, p_basis, i_h, group_start, num_groups,
    ok_coef, ok_coef_scale, ok_codes, ok_scale, ok_zero, M,
    D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, NT: tl.constexpr,
):  # fmt: skip
    """`codes^T (scale * q) + (zero . q) + E^T (C q)` of the four slices of a page, `[W / 4, BM]` each."""
    E: tl.constexpr = W // 32
    b_y = tl.dot(coefficient_operand(p_words, (ok_coef + i_h * M * D) // 4, M, D, BD), b_q)
    o_y = tl.arange(0, 16)
    p_scale = (p_words + ok_coef_scale // 4).to(tl.pointer_type(tl.float16)) + i_h * M
    b_scale = tl.load(p_scale + o_y, mask=o_y < M, other=0.0).to(tl.float32) * UNIT
    b_y = (b_y + b_bias[None, :]) * b_scale[:, None]
    b_y = tl.dot(zero_operand(p_words, (ok_zero + i_h * D * 2) // 4, D, BD), b_q, b_y)
    b_y = two_terms(b_y, BM)

    b_s0 = tl.zeros([W // 4, BM], tl.float32)
    b_s1, b_s2, b_s3 = b_s0, b_s0, b_s0
    o_l, o_n = tl.arange(0, NT * 32), tl.arange(0, NT * BM * 4)
    o_group, o_query = o_l // 32 * 4 + o_l % 4, o_n // (BM * 4) * 4 + o_n % 4
    p_codes = p_words + (ok_codes + group_start * W) // 4
    p_column = p_words + (ok_scale + group_start * 8) // 4
    for i_n in range(0, num_groups, NT * 4):
        m_l, m_n = i_n + o_group < num_groups, i_n + o_query < num_groups
        b_w = load_words(p_codes, ((i_n + o_group) * 8 + o_l // 4 % 8) * E, m_l, E)
        b_c = column_operand(load_words(p_column, (i_n + o_group) * 2, m_l, 2), NT, 8)
        p_x = p_query[:, None] + (i_n + o_query)[:, None] * 2 + tl.arange(0, 2)[None, :]
        b_x = column_operand(tl.load(p_x, mask=m_n[:, None], other=0), NT, BM)
        b_x *= repeat_columns(b_c, NT * 16, BM)
        b_s0 = tl.dot(column_codes(b_w, 0, NT, E), b_x, b_s0)
        b_s1 = tl.dot(column_codes(b_w, 2, NT, E), b_x, b_s1)
        b_s2 = tl.dot(column_codes(b_w, 4, NT, E), b_x, b_s2)
        b_s3 = tl.dot(column_codes(b_w, 6, NT, E), b_x, b_s3)
    b_s0 = add_basis(b_s0 * UNIT, p_basis, b_y, 0, E)
    b_s1 = add_basis(b_s1 * (UNIT / 4), p_basis, b_y, 1, E)
    b_s2 = add_basis(b_s2 * (UNIT / 16), p_basis, b_y, 2, E)
    b_s3 = add_basis(b_s3 * (UNIT / 64), p_basis, b_y, 3, E)
    return b_s0, b_s1, b_s2, b_s3


@triton.jit
def load_rows(p_words, o_x, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, E: tl.constexpr):
    """Words of one plane of V's codes, of `8 * E` dims a run; the lanes of dims from D on hold 0."""
    ND: tl.constexpr = BD // (8 * E)
    o_l = tl.arange(0, W // 64 * ND * 32)
    i_k, i_d = o_l // (32 * ND), o_l // 32 % ND
    o_w = ((i_k * (D // (8 * E)) + i_d) * 32 + o_l % 4 * 8 + o_l // 4 % 8) * E
    return load_words(p_words + o_x, o_w, i_d * (8 * E) < D, E)


@triton.jit
def add_rows(
    b_acc, b_w, b_p0, b_p1, b_p2, b_p3,
    BD: tl.constexpr, W: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Add codes `[BD, W]` of words `b_w` times weights `[W / 4, BM]` of the four slices."""
    ND: tl.constexpr = BD // (8 * E)
    b_acc = tl.dot(row_codes(b_w, 0x00030003, W // 64, ND, E), b_p0, b_acc)
    b_acc = tl.dot(row_codes(b_w, 0x000C000C, W // 64, ND, E), b_p1, b_acc)
    b_acc = tl.dot(row_codes(b_w, 0x00300030, W // 64, ND, E), b_p2, b_acc)
    return tl.dot(row_codes(b_w, 0x00C000C0, W // 64, ND, E), b_p3, b_acc)


@triton.jit
def add_high(
    b_acc, b_w, b_p0, b_p1, b_p2, b_p3,
    BD: tl.constexpr, W: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The same of the 1-bit plane, worth 4 a bit."""
    ND: tl.constexpr = BD // (16 * E)
    b_acc = tl.dot(high_codes(b_w, 0x00010001, W // 64, ND, E), (b_p0 * 4).to(tl.float16), b_acc)
    b_acc = tl.dot(high_codes(b_w, 0x00040004, W // 64, ND, E), (b_p1 * 4).to(tl.float16), b_acc)
    b_acc = tl.dot(high_codes(b_w, 0x00100010, W // 64, ND, E), (b_p2 * 4).to(tl.float16), b_acc)
    return tl.dot(high_codes(b_w, 0x00400040, W // 64, ND, E), (b_p3 * 4).to(tl.float16), b_acc)


@triton.jit
def first_lines(
    i_h, group_start, num_groups, ok_coef, ok_codes, ok_scale, ok_zero, ov_codes, ov_scale, ov_zero,
    M, D: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Cache lines of a page that one head reads first: of K's codes, of V's, of the small planes."""
    o_k = lines_of(ok_codes + group_start * W, num_groups * W, 64)
    o_v = lines_of(ov_codes + i_h * (W * D // 4), W * D // 4, 32)
    i_x = tl.arange(0, 32) // 4
    o_x = tl.where(i_x == 1, ok_zero + i_h * (D * 2), ok_scale + group_start * 8)
    o_x = tl.where(i_x == 2, ok_coef + i_h * (M * D), o_x)
    o_x = tl.where(i_x == 3, ov_scale + i_h * (W * 2), o_x)
    o_x = tl.where(i_x == 4, ov_zero + i_h * (W * 2), o_x)
    return o_k, o_v, o_x + tl.arange(0, 32) % 4 * 128


@triton.jit(
    do_not_specialize=["S", "L", "M", "splits", "num_splits", "stride_table"],
    do_not_specialize_on_alignment=BATCH_POINTERS,
)
def fragment_pages_kernel(
    p_q, p_columns, p_pages, p_page_table, p_num_pages, p_gap_pages, p_seq_lens, p_query_start,
    p_acc, p_lse, p_basis, p_column_start,
    ok_coef, ok_coef_scale, ok_codes, ok_scale, ok_zero, ov_codes, ov_scale, ov_zero, ov_high,
    stride_q, stride_columns, stride_page, stride_table, q_scale, S, L, M,
    splits, num_splits,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr,
    BM: tl.constexpr, NT: tl.constexpr,
    MANY: tl.constexpr, V_BITS: tl.constexpr, EV: tl.constexpr, EH: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Attend one share of one request's pages for a tile of its query rows; the grid is `pages_kernel`'s.

    `p_columns` are the queries by column of codes, two fp16 a word; BM is 8, the columns of the smallest
    matrix instruction.
    """
    QW: tl.constexpr = W // 4
    E: tl.constexpr = W // 32
    LEVELS: tl.constexpr = V_BITS // 2
    # Weights are at most 2^HEADROOM: the largest in fp16, times 4^level, with the small ones still normal.
    HEADROOM: tl.constexpr = 12 if V_BITS == 3 else 14 - 2 * (LEVELS - 1)
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
    o_k = place_of_dim(tl.arange(0, BD))
    m_q = (o_k < D)[:, None] & m_row[None, :]
    b_q = tl.load(p_q + o_row[None, :] + o_k[:, None], mask=m_q, other=0.0)
    b_q = (b_q.to(tl.float32) * q_scale).to(tl.float16)  # [BD, BM]
    b_bias = tl.sum(b_q.to(tl.float32), 0) * (-128.0 / UNIT)
    # Rows that do not exist read the tile's first: nobody stores what comes of them.
    o_n = i_m * BM + tl.arange(0, 4 * BM) // 4 % BM
    o_n = tl.where(o_n < num_queries * G, o_n, i_m * BM)
    p_query = (
        p_columns + ((start + o_n // G).to(tl.int64) * (H * G) + i_h * G + o_n % G) * stride_columns
    )
    p_query = tl.reshape(tl.broadcast_to(p_query[None, :], (NT, 4 * BM)), (NT * BM * 4,))
    group_start = tl.load(p_column_start + i_h)
    num_groups = tl.load(p_column_start + i_h + 1) - group_start

    b_max = tl.full([BM], -float("inf"), tl.float32)
    # Summed over tokens once, at the end.
    b_sums = tl.zeros([QW, BM], tl.float32)
    b_zeros = tl.zeros([QW, BM], tl.float32)
    b_acc = tl.zeros([BD, BM], tl.float32)
    o_j = tl.arange(0, QW)
    last = tl.minimum(num_pages, (i_s + 1) * share)
    p_table = p_page_table + i_b.to(tl.int64) * stride_table
    next_page = tl.load(p_table + i_s * share, mask=i_s * share < last, other=0)
    o_k_lines, o_v_lines, o_small = first_lines(
        i_h, group_start, num_groups, ok_coef, ok_codes, ok_scale, ok_zero, ov_codes, ov_scale,
        ov_zero, M, D, W,
    )  # fmt: skip
    for i_p in range(i_s * share, last):
        p_words = (p_pages + next_page.to(tl.int64) * stride_page).to(tl.pointer_type(tl.int32))
        next_page = tl.load(p_table + i_p + 1, mask=i_p + 1 < last, other=0)
        p_next = p_pages + next_page.to(tl.int64) * stride_page
        prefetch(p_next, o_k_lines, ASM)
        prefetch(p_next, o_v_lines, ASM)
        prefetch(p_next, o_small, ASM)
        o_v = (ov_codes + i_h * (QW * D)) // 4
        # Under way while K is worked on.
        b_w = load_rows(p_words, o_v, D, BD, W, EV)
        b_s0, b_s1, b_s2, b_s3 = page_scores(
            b_q, b_bias, p_query, p_words, p_basis, i_h, group_start, num_groups,
            ok_coef, ok_coef_scale, ok_codes, ok_scale, ok_zero, M, D, BD, W, BM, NT,
        )  # fmt: skip
        if i_p * W < S:
            o_w = (i_p * W + o_j)[:, None]
            b_s0 = tl.where(o_w >= S, b_s0, -float("inf"))
            b_s1 = tl.where(o_w + QW >= S, b_s1, -float("inf"))
            b_s2 = tl.where(o_w + 2 * QW >= S, b_s2, -float("inf"))
            b_s3 = tl.where(o_w + 3 * QW >= S, b_s3, -float("inf"))
        if MANY:
            m_s = (i_p < b_end)[None, :]
            b_s0 = tl.where(m_s, b_s0, -float("inf"))
            b_s1 = tl.where(m_s, b_s1, -float("inf"))
            b_s2 = tl.where(m_s, b_s2, -float("inf"))
            b_s3 = tl.where(m_s, b_s3, -float("inf"))
        o_scale = (ov_scale + i_h * (W * 2)) // 4
        b_f0, b_f1 = load_token_numbers(p_words, o_scale, E, BM)
        b_f2, b_f3 = load_token_numbers(p_words, o_scale + E, E, BM)
        o_zero = (ov_zero + i_h * (W * 2)) // 4
        b_z0, b_z1 = load_token_numbers(p_words, o_zero, E, BM)
        b_z2, b_z3 = load_token_numbers(p_words, o_zero + E, E, BM)
        b_most = tl.maximum(tl.maximum(b_s0, b_s1), tl.maximum(b_s2, b_s3))
        scale = tl.max(tl.max(tl.maximum(tl.maximum(b_f0, b_f1), tl.maximum(b_f2, b_f3)), 1), 0)
        bits = tl.log2(tl.maximum(scale, 1 / UNIT)) - HEADROOM
        b_new = tl.maximum(b_max, tl.max(b_most, 0) + bits)
        b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_old = tl.exp2(b_max - b_safe)[None, :]
        b_max = b_new
        b_p0 = tl.exp2(b_s0 - b_safe[None, :])
        b_p1 = tl.exp2(b_s1 - b_safe[None, :])
        b_p2 = tl.exp2(b_s2 - b_safe[None, :])
        b_p3 = tl.exp2(b_s3 - b_safe[None, :])
        b_sums = b_sums * b_old + (b_p0 + b_p1) + (b_p2 + b_p3)
        b_zeros = b_zeros * b_old + b_p0 * b_z0 + b_p1 * b_z1 + b_p2 * b_z2 + b_p3 * b_z3
        b_acc *= b_old
        b_p0 = (b_p0 * b_f0).to(tl.float16)
        b_p1 = (b_p1 * (b_f1 / 4)).to(tl.float16)
        b_p2 = (b_p2 * (b_f2 / 16)).to(tl.float16)
        b_p3 = (b_p3 * (b_f3 / 64)).to(tl.float16)
        b_acc = add_rows(b_acc, b_w, b_p0, b_p1, b_p2, b_p3, BD, W, EV)
        for i_level in tl.static_range(1, LEVELS):
            b_p0, b_p1, b_p2, b_p3 = b_p0 * 4, b_p1 * 4, b_p2 * 4, b_p3 * 4
            b_w = load_rows(p_words, o_v + i_level * H * (QW * D // 4), D, BD, W, EV)
            b_acc = add_rows(b_acc, b_w, b_p0, b_p1, b_p2, b_p3, BD, W, EV)
        if V_BITS == 3:
            b_w = load_rows(p_words, (ov_high + i_h * (W * D // 8)) // 4, D // 2, BD // 2, W, EH)
            b_acc = add_high(b_acc, b_w, b_p0, b_p1, b_p2, b_p3, BD, W, EH)
    b_acc = b_acc * UNIT + tl.sum(b_zeros, 0)[None, :]
    store_part(p_acc, p_lse, b_acc, b_max, tl.sum(b_sums, 0), i_row, m_row, i_s, num_splits, D, BD)


def attend_fragment_pages(layer: Layer, step: Step, q: Tensor, parts: Parts) -> None:
    """`decode.attend_pages` for pages in fragment order."""
    tables, _, scale, pages, _ = layer
    acc, lse, columns, splits, _ = parts
    window, page_table, num_pages = step.window, step.page_table, step.num_pages
    _, Hq, D = q.shape
    layout, k = tables.layout, tables.k
    H, W = layout.num_kv_heads, layout.page_size
    G, B = Hq // H, len(num_pages)
    rows = step.max_query_len * G
    ok_coef, ok_coef_scale, _, *ok_rest = k.offsets
    *_, ov_codes, ov_scale, ov_zero, ov_high = tables.v_offsets
    fragment_pages_kernel[(triton.cdiv(rows, MIN_ROWS) * splits, H, B)](
        q, columns.view(torch.int32), pages, page_table, num_pages, step.gap_pages, step.seq_lens,
        step.query_start_loc, acc, lse, tables.fragment_basis, k.column_start,
        ok_coef, ok_coef_scale, *ok_rest, ov_codes, ov_scale, ov_zero, ov_high,
        q.stride(0), tables.num_columns // 2, pages.stride(0), page_table.stride(0), scale * LOG2_E,
        window.sink_tokens, window.local_window, tables.num_rows, splits, acc.shape[2],
        H=H, G=G, D=D, BD=max(64, next_power_of_2(D)), W=W, BM=MIN_ROWS, NT=4,
        MANY=step.max_query_len > 1, V_BITS=tables.v_bits, EV=run_of(D // 8), EH=run_of(D // 16),
        ASM=q.is_cuda and torch.version.hip is None, num_warps=1, num_stages=1,
    )  # fmt: skip
