"""Split-KV attention over the raw tokens of the local cache: the pinned first ones and the window."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fourier_vllm.kernels.gpu.split import BATCH_POINTERS, LOG2_E, TL_DTYPES, first_raw, query_rows
from fourier_vllm.kernels.gpu.step import Layer, Parts, Step
from fourier_vllm.kernels.gpu.tables import next_power_of_2

MAX_SPLITS = 5


@triton.jit(
    do_not_specialize=["S", "L", "splits", "first_split", "num_splits", "stride_table"],
    do_not_specialize_on_alignment=BATCH_POINTERS,
)
def raw_kernel(
    p_q, p_local, p_block_table, p_num_pages, p_gap_pages, p_seq_lens, p_query_start, p_acc, p_lse,
    stride_q, stride_block, stride_head, stride_token, stride_table, q_scale, S, L,
    splits, first_split, num_splits,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Attend one share of one request's raw tokens for a tile of its query rows.

    Grid: (tiles of BM rows times shares, H, B). Raw tokens are cut into tiles of BT, the sinks' first; a
    share is a run of tiles.
    """
    i_h, i_b = tl.program_id(1), tl.program_id(2)
    i_m, i_s = tl.program_id(0) // splits, tl.program_id(0) % splits
    start, num_queries, o_t, o_g, m_row = query_rows(p_query_start, i_b, i_h, i_m, G, BM)
    if i_m * BM >= num_queries * G:
        return
    o_d = tl.arange(0, BD)
    m_d = (o_d < D)[None, :]
    o_row = (start + o_t).to(tl.int64) * stride_q + o_g * D
    m_q = m_row[:, None] & m_d
    b_q = tl.load(p_q + o_row[:, None] + o_d[None, :], mask=m_q, other=0.0).to(DOT)

    num_pages, gap_pages = tl.load(p_num_pages + i_b), tl.load(p_gap_pages + i_b)
    seq_len = tl.load(p_seq_lens + i_b)
    b_n = seq_len - num_queries + 1 + o_t
    b_raw = first_raw(b_n, num_pages, gap_pages, L, W) * W
    # The first query token reads the most raw tokens.
    low = first_raw(seq_len - num_queries + 1, num_pages, gap_pages, L, W) * W
    pinned = tl.cdiv(tl.minimum(S, low), BT)
    tiles = pinned + tl.cdiv(seq_len - low, BT)
    share = tl.cdiv(tiles, splits)
    b_max = tl.full([BM], -float("inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BD], tl.float32)
    p_table = p_block_table + i_b.to(tl.int64) * stride_table
    for i in range(i_s * share, tl.minimum(tiles, (i_s + 1) * share)):
        is_pinned = i < pinned
        o_w = tl.arange(0, BT) + tl.where(is_pinned, i * BT, low + (i - pinned) * BT)
        m_w = o_w < tl.where(is_pinned, tl.minimum(S, low), seq_len)
        block = tl.load(p_table + o_w // BLOCK, mask=m_w, other=0).to(tl.int64)
        o_x = block * stride_block + i_h * stride_head + (o_w % BLOCK) * stride_token
        m_x = m_w[:, None] & m_d
        p_x = p_local + o_x[:, None] + o_d[None, :]
        b_k = tl.load(p_x, mask=m_x, other=0.0).to(DOT)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * q_scale
        m_s = m_w[None, :] & (o_w[None, :] < b_n[:, None])
        m_s &= (o_w[None, :] < S) | (o_w[None, :] >= b_raw[:, None])
        b_s = tl.where(m_s, b_s, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_old = tl.exp2(b_max - b_safe)
        b_p = tl.exp2(b_s - b_safe[:, None])
        b_v = tl.load(p_x + D, mask=m_x, other=0.0).to(DOT)
        b_sum = b_sum * b_old + tl.sum(b_p, 1)
        b_acc = b_acc * b_old[:, None] + tl.dot(b_p.to(DOT), b_v, input_precision="ieee")
        b_max = b_new
    b_some = tl.where(b_sum > 0, b_sum, 1.0)
    H = tl.num_programs(1)
    o_o = ((start + o_t).to(tl.int64) * (H * G) + o_g) * num_splits + first_split + i_s
    tl.store(p_acc + o_o[:, None] * D + o_d[None, :], b_acc / b_some[:, None], mask=m_q)
    b_lse = tl.where(b_sum > 0, b_max + tl.log2(b_some), -float("inf"))
    tl.store(p_lse + o_o, b_lse, mask=m_row)


def parts_of_raw(num_requests: int, num_kv_heads: int, num_sms: int) -> int:
    """Shares of the raw tokens, a few tiles, that give every multiprocessor a program."""
    return max(1, min(MAX_SPLITS, num_sms // (num_requests * num_kv_heads)))


def attend_raw(layer: Layer, step: Step, q: Tensor, parts: Parts) -> None:
    """Partial attention of every query token over the raw tokens it reads.

    A query token that sees n tokens reads the sinks among them, and those behind the pages that
    `attend_pages` gives it.

    Parameters
    ----------
    q : Tensor [T, Hq, D]
        Of the local cache's dtype; a row's heads contiguous.
    parts : Parts
        Those behind the first `of_pages` are written.
    """
    tables, _, scale, _, local = layer
    acc, lse, _, first_split, splits = parts
    window, seq_lens, local_table = step.window, step.seq_lens, step.local_table
    _, Hq, D = q.shape
    H = local.shape[1]
    G = Hq // H
    rows = step.max_query_len * G
    BM = min(64, next_power_of_2(rows))
    # Triton's interpreter multiplies bfloat16 as if it were integers.
    interpreted = triton.knobs.runtime.interpret
    raw_kernel[(triton.cdiv(rows, BM) * splits, H, len(seq_lens))](
        q, local, local_table, step.num_pages, step.gap_pages, seq_lens, step.query_start_loc,
        acc, lse, q.stride(0), *local.stride()[:3], local_table.stride(0), scale * LOG2_E,
        window.sink_tokens, window.local_window, splits, first_split, acc.shape[2],
        G=G, D=D, BD=next_power_of_2(D), W=tables.layout.page_size, BLOCK=local.shape[2],
        BM=BM, BT=64,
        DOT=tl.float32 if interpreted else TL_DTYPES[q.dtype], num_warps=4, num_stages=1,
    )  # fmt: skip
