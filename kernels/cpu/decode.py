"""Decode attention on a CPU, compiled by numba: one pass over the codes, nothing rebuilt in memory.

The same sums as `reference/attention.py`, its ground truth; a work item is one KV head of
one request. Loops run over contiguous bytes, so that LLVM makes vector code of them.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch

from fourier_vllm.kernels.cpu.compiled import attend
from fourier_vllm.kernels.cpu.layout import KINDS, numbers, views_of
from fourier_vllm.kernels.reference.codec import PageCodec

CORES = os.sched_getaffinity(0)
MIN_ITEMS = 4  # of a thread: starting one costs about as much as a short item


def decode_attention(
    codec: PageCodec,
    q: torch.Tensor,
    pages: torch.Tensor,
    page: torch.Tensor,
    page_start: torch.Tensor,
    sink_tokens: int,
    local: torch.Tensor,
    block: torch.Tensor,
    raw_mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """One query token a request over its sealed pages and raw tokens, one softmax over both.

    Parameters
    ----------
    q : torch.Tensor
        `[N, H, G, D]`.
    pages : torch.Tensor
        `[blocks, page_bytes]` uint8, the page cache.
    page, page_start : torch.Tensor
        `[P]` block ids of all requests' pages, in order, and `[N + 1]` where each request's begin.
    sink_tokens : int
        Leading tokens of a request's first page that are among the raw ones instead.
    local : torch.Tensor
        `[blocks, H, block_size, 2 * D]`, the local cache, of the model's dtype.
    block : torch.Tensor
        `[N, B]` raw blocks.
    raw_mask : torch.Tensor
        `[N, B * block_size]` bool, True where a token is read.

    Returns
    -------
    torch.Tensor
        `[N, H, G, D]` float32.
    """
    N, H, G, D = q.shape
    k, v_channel, v_token = numbers(codec)
    out = q.new_empty((N, H, 2, G, D), dtype=torch.float32)
    arguments: tuple[Any, ...] = (
        k,
        v_channel,
        v_token,
        views_of(pages),
        views_of(local.flatten(1).view(torch.uint8)),
        page.numpy(),
        page_start.numpy(),
        block.numpy(),
        raw_mask.numpy(),
        KINDS[local.dtype],
        sink_tokens,
        (q.float() * scale).contiguous().numpy(),
        out.numpy(),
    )
    items = N * H
    threads = min(torch.get_num_threads(), items // MIN_ITEMS)
    if threads <= 1:
        attend(*arguments, 0, items)
    else:
        bounds = [items * i // threads for i in range(threads + 1)]
        list(_pool(threads).map(lambda a, b: attend(*arguments, a, b), bounds[:-1], bounds[1:]))
    return codec.v.finish(out[:, :, 0]) + out[:, :, 1]


def warm_up(codec: PageCodec, dtype: torch.dtype) -> None:
    """Compile, or load from numba's cache, before the first request comes."""
    H, D = codec.layout.num_kv_heads, codec.layout.head_size
    none = torch.zeros(0, dtype=torch.long)
    decode_attention(
        codec,
        torch.zeros(1, H, 1, D),
        torch.zeros(1, codec.layout.page_bytes, dtype=torch.uint8),
        none,
        torch.zeros(2, dtype=torch.long),
        0,
        torch.zeros(1, H, 8, 2 * D, dtype=dtype),
        torch.zeros(1, 1, dtype=torch.long),
        torch.ones(1, 8, dtype=torch.bool),
        1.0,
    )


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    # vLLM binds the thread that starts these to one core, and they would inherit that.
    return ThreadPoolExecutor(threads, initializer=os.sched_setaffinity, initargs=(0, CORES))
