"""How far each request reads pages in a step, worked out on the device once for all layers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fourier_vllm.kernels.gpu.split import BATCH_POINTERS

BLOCKS = 64


@triton.jit(
    do_not_specialize=["L", "num_pinned", "stride_table"],
    do_not_specialize_on_alignment=BATCH_POINTERS,
)
def read_bounds_kernel(
    p_seq_lens, p_query_start, p_local_table, p_is_exact, p_num_pages, p_gap_pages, stride_table, L,
    num_pinned, W: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr, SOME_EXACT: tl.constexpr,
):  # fmt: skip
    """Bounds of one request; its blocks are looked through BN at a time. Grid: (B,)."""
    i_b = tl.program_id(0)
    seq_len = tl.load(p_seq_lens + i_b)
    num_queries = tl.load(p_query_start + i_b + 1) - tl.load(p_query_start + i_b)
    context = tl.maximum(seq_len - num_queries, 0)
    start = tl.maximum(context + 1 - L, 0) // W
    if SOME_EXACT:
        start = tl.where(tl.load(p_is_exact + i_b) != 0, 0, start)
    # The last null block behind the pinned ones: its tokens are gone, their pages are read.
    gap = 0
    for i_n in range(start * W // BLOCK, tl.cdiv(context, BLOCK), BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = (o_n * BLOCK < context) & (o_n >= num_pinned)
        b_block = tl.load(p_local_table + i_b.to(tl.int64) * stride_table + o_n, mask=m_n, other=1)
        gap = tl.maximum(gap, tl.max(tl.where(b_block == 0, o_n + 1, 0), 0))
    gap = tl.cdiv(gap * BLOCK, W)
    tl.store(p_gap_pages + i_b, gap)
    tl.store(p_num_pages + i_b, tl.maximum(start, gap))


def read_bounds(
    seq_lens: Tensor,
    query_start_loc: Tensor,
    local_table: Tensor,
    local_window: int,
    page_size: int,
    block_size: int,
    num_pinned_blocks: int,
    is_exact: Tensor | None,
    num_pages: Tensor,
    gap_pages: Tensor,
) -> None:
    """Write `num_pages, gap_pages [B]`, int32: pages that a request's first query token reads, and at least.

    Parameters
    ----------
    seq_lens, query_start_loc : Tensor [B], [B + 1], int32
    local_table : Tensor [B, max_blocks], int32
        Null blocks are 0.
    is_exact : Tensor [B], bool, optional
        Requests that read pages only where raw tokens are gone.
    """
    read_bounds_kernel[(len(seq_lens),)](
        seq_lens, query_start_loc, local_table, seq_lens if is_exact is None else is_exact, num_pages,
        gap_pages, local_table.stride(0), local_window, num_pinned_blocks, W=page_size,
        BLOCK=block_size, BN=BLOCKS, SOME_EXACT=is_exact is not None, num_warps=1,
    )  # fmt: skip
