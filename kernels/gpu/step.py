"""What the host functions of the kernels take: a step, a layer, and the parts of split attention."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fourier_vllm.kernels.gpu.launch import Launches
from fourier_vllm.kernels.gpu.tables import Tables
from fourier_vllm.window import Window


class Step(NamedTuple):
    """B requests and their tokens, made once for all layers of an engine step.

    Attributes
    ----------
    seq_lens, query_start_loc : Tensor [B], [B + 1], int32
        Tokens of each request, this step included, and where its own begin among those of the step.
    page_table, local_table : Tensor [B, max_pages], [B, max_blocks], int32
        Blocks of the page cache by index of the page, and of the local cache by position; entries that nobody
        reads may be anything.
    slots : Tensor [n], int64
        Cells of the local cache for the step's first n tokens; padding is negative.
    num_pages, gap_pages : Tensor [B], int32
        Pages that a request's first query token reads, and those that it reads at least (`bounds.py`).
    window : Window
    max_query_len : int
        Query tokens of a request, at most, where it attends pages.
    """

    seq_lens: Tensor
    query_start_loc: Tensor
    page_table: Tensor
    local_table: Tensor
    slots: Tensor
    num_pages: Tensor
    gap_pages: Tensor
    window: Window
    max_query_len: int = 1

    def first(self, n: int) -> Step:
        """The first `n` requests, for attention: `slots` are still those of all."""
        if n == len(self.seq_lens):
            return self
        return self._replace(
            seq_lens=self.seq_lens[:n],
            query_start_loc=self.query_start_loc[: n + 1],
            page_table=self.page_table[:n],
            local_table=self.local_table[:n],
            num_pages=self.num_pages[:n],
            gap_pages=self.gap_pages[:n],
        )


class Layer(NamedTuple):
    """A layer's tables and its two caches.

    Attributes
    ----------
    tables : Tables
    seals : Launches
        Of `seal.py`, kept as long as `tables`.
    scale : float
        Of the scores, before the softmax.
    pages : Tensor [blocks, ..., page_bytes], uint8
        The page cache; a block may be wider than a page.
    local : Tensor [blocks, H, block_size, 2 * D]
        The local cache, K and V of a token side by side.
    """

    tables: Tables
    seals: Launches
    scale: float
    pages: Tensor
    local: Tensor


class Parts(NamedTuple):
    """Scratch of split attention for T query tokens: parts of the pages first, then those of raw tokens.

    Attributes
    ----------
    acc, lse : Tensor [T, Hq, n, D], [T, Hq, n], float32
        Normalised outputs, in V's rotated basis where they are of pages, and base-2 log-sum-exps. Empty
        parts: `lse` is -inf, `acc` stays unwritten.
    columns : Tensor [T, Hq, num_columns], float16
        Queries by column of codes, for pages in fragment order.
    of_pages, of_raw : int
        n together; at least one is of pages.
    """

    acc: Tensor
    lse: Tensor
    columns: Tensor
    of_pages: int
    of_raw: int
