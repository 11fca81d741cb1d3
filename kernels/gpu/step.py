"""What the requests of a step bring to a layer, for writing its caches and for reading them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """B requests with T query tokens, and what these read.

    Attributes
    ----------
    q : Tensor [T, Hq, D]
        16 bits or float32; a row's heads contiguous.
    query_start_loc : Tensor [B + 1], int32
        First query token of each request; a request may have none.
    page_table, num_pages : Tensor [B, max_pages], [B], int32
        Pages of each request.
    sm_scale : float
        Of the scores, before the softmax.
    sink_tokens : int
        First tokens of a request, which are not read from pages.
    max_query_len : int
        Query tokens of a request, at most.
    seq_lens, gap_pages : Tensor [B], int32, optional
        Tokens of each request, its queries included: query tokens read pages as their own lengths say,
        and at least `gap_pages`. Without them all read `num_pages`.
    local_window : int
        L, with `seq_lens`.
    """

    q: Tensor
    query_start_loc: Tensor
    page_table: Tensor
    num_pages: Tensor
    sm_scale: float
    sink_tokens: int
    max_query_len: int = 1
    seq_lens: Tensor | None = None
    gap_pages: Tensor | None = None
    local_window: int = 0


class Tokens(NamedTuple):
    """Keys and values of a step, and the caches that have those before.

    Attributes
    ----------
    k, v : Tensor [T, H, D]
        Tokens of this step, keys after RoPE; heads of a row contiguous.
    local : Tensor [blocks, H, block_size, 2 * D]
        The local cache, K and V of a token side by side.
    pages : Tensor [blocks, ..., page_bytes], uint8
        The page cache; a block may be wider than a page.
    local_table, page_table : Tensor [B, max_blocks], [B, max_pages], int32
        By position, and by index of the page.
    seq_lens, query_start_loc : Tensor [B], [B + 1], int32
        Tokens of each request, this step included, and where its own begin in `k` and `v`.
    sink_tokens : int
        First tokens of a request, which are always read raw.
    """

    k: Tensor
    v: Tensor
    local: Tensor
    pages: Tensor
    local_table: Tensor
    page_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    sink_tokens: int
