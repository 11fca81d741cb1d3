"""What the kernels of split-KV attention share: which tokens a query row reads, and how pages are split."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

# Arguments that are views into tensors of a step: compiled once, wherever they begin.
BATCH_POINTERS = [
    "p_page_table", "p_local_table", "p_block_table", "p_num_pages", "p_gap_pages", "p_seq_lens",
    "p_query_start", "p_starts", "p_slots", "p_is_exact",
]  # fmt: skip
PAGES_TO_START = 2  # what starting and ending a program costs, in pages
LOG2_E = 1.4426950408889634
TL_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


@triton.jit
def first_raw(b_n, num_pages, gap_pages, L, W: tl.constexpr):
    """Pages that query tokens which see `b_n` tokens read; everything behind them is read raw.

    The twin of `window.pages_before`, between the pages without raw tokens and those that are sealed.
    """
    return tl.minimum(num_pages, tl.maximum(gap_pages, tl.maximum(b_n - L, 0) // W))


@triton.jit
def pages_read(
    p_num_pages, p_gap_pages, p_seq_lens, i_b, num_queries, o_t, L, W: tl.constexpr
):  # fmt: skip
    """Pages that a request's last query token reads, the most, and each of its query tokens `o_t [BM]`."""
    num_pages, gap_pages = tl.load(p_num_pages + i_b), tl.load(p_gap_pages + i_b)
    n = tl.load(p_seq_lens + i_b)
    b_end = first_raw(n - num_queries + 1 + o_t, num_pages, gap_pages, L, W)
    return first_raw(n, num_pages, gap_pages, L, W), b_end


@triton.jit
def query_rows(p_query_start, i_b, i_h, i_m, G: tl.constexpr, BM: tl.constexpr):
    """First token and number of tokens of a request; token, head and validity of a tile's rows `[BM]`."""
    start = tl.load(p_query_start + i_b)
    num_queries = tl.load(p_query_start + i_b + 1) - start
    o_m = i_m * BM + tl.arange(0, BM)
    return start, num_queries, o_m // G, i_h * G + o_m % G, o_m < num_queries * G


@triton.jit
def store_part(
    p_acc, p_lse, b_acc, b_max, b_sum, i_row, m_row, i_s, num_splits, D: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Write part `i_s` of rows `i_row [BM]`: sums `[BD, BM]` normalised, and base-2 log-sum-exps."""
    b_some = tl.where(b_sum > 0, b_sum, 1.0)
    o_d = tl.arange(0, BD)
    o_o = i_row * num_splits + i_s
    m_o = (o_d < D)[:, None] & m_row[None, :]
    tl.store(p_acc + o_o[None, :] * D + o_d[:, None], b_acc / b_some[None, :], mask=m_o)
    b_lse = tl.where(b_sum > 0, b_max + tl.log2(b_some), -float("inf"))
    tl.store(p_lse + o_o, b_lse, mask=m_row)


@triton.jit
def store_empty_part(p_lse, i_row, m_row, i_s, num_splits):
    """Part `i_s` has no tokens: nobody reads its sums."""
    tl.store(p_lse + i_row * num_splits + i_s, i_row.to(tl.float32) * 0 - float("inf"), mask=m_row)


@cache
def parts_of_pages(num_requests: int, num_kv_heads: int, max_pages: int, num_sms: int) -> int:
    """Shares of a request's pages that keep the GPU busy: programs are warps, and registers hold 8 a SM."""
    slots, pairs = 8 * num_sms, num_requests * num_kv_heads

    def pages_in_turn(splits: int) -> int:
        rounds = -(-pairs * splits // slots)
        return rounds * (-(-max_pages // splits) + PAGES_TO_START)

    return min(range(1, max(max_pages, 1) + 1), key=pages_in_turn)
