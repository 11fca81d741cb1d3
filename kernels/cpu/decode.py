"""Decode attention on a CPU, compiled by numba: one pass over the codes, nothing rebuilt in memory.

The same sums as `reference_attention.decode_attention`, its ground truth; a work item is one KV head of
one request. Loops run over contiguous bytes, so that LLVM makes vector code of them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from fourier_vllm.kernels.cpu.channel import channel_combine, channel_scores
from fourier_vllm.kernels.cpu.layout import Channel, Token, numbers
from fourier_vllm.kernels.cpu.memory import FLOAT32, KINDS, Row, Views, jit, load, new_row, views_of
from fourier_vllm.kernels.cpu.token import token_combine
from fourier_vllm.kernels.reference import PageCodec


@jit
def _load_blocks(
    local: Views, block: np.ndarray, start: int, count: int, kind: int, cells: Row
) -> None:
    """`count` numbers from element `start` of every block, one block after the other."""
    itemsize = 4 if kind == FLOAT32 else 2
    for b in range(len(block)):
        part = Row(
            cells.bits[b * count : (b + 1) * count], cells.values[b * count : (b + 1) * count]
        )
        load(local, block[b] * local.stride + start * itemsize, count, kind, part)


@jit
def _exponentiate(s: np.ndarray, top: np.float32) -> np.float32:
    """Scores to exp(score - top) in place; their sum."""
    total = np.float32(0.0)
    for t in range(len(s)):
        s[t] = np.exp(s[t] - top)
        total += s[t]
    return total


@jit
def _attend(
    k: Channel,
    v_channel: Channel,
    v_token: Token,
    pages: Views,
    local: Views,
    page: np.ndarray,
    block: np.ndarray,
    mask: np.ndarray,
    H: int,
    head: int,
    kind: int,
    sink_tokens: int,
    q: np.ndarray,
    out: np.ndarray,
) -> None:
    """One KV head of one request: `q [G, D]`, `out [2, G, D]` from pages and from raw tokens."""
    G, D = q.shape
    W = k.basis.shape[1]
    P, T = len(page), len(mask)
    block_size = T // len(block)
    s, s_raw = np.empty((P, G, W), np.float32), np.empty((G, T), np.float32)
    for i in range(P):
        channel_scores(k, pages, page[i] * pages.stride, head, kind, q, s[i])
    if P:
        s[0, :, :sink_tokens] = -np.inf
    cells = new_row(T * 2 * D)
    raw = cells.values.reshape(T, 2 * D)
    _load_blocks(local, block, head * block_size * 2 * D, block_size * 2 * D, kind, cells)
    for t in range(T):
        if not mask[t]:  # anything, NaN included
            raw[t] = 0.0
        for g in range(G):
            dot = np.float32(0.0)
            for d in range(D):
                dot += q[g, d] * raw[t, d]
            s_raw[g, t] = dot if mask[t] else -np.inf
    for g in range(G):
        top = s_raw[g].max()
        for i in range(P):
            top = max(top, s[i, g].max())
        total = _exponentiate(s_raw[g], top)
        for i in range(P):
            total += _exponentiate(s[i, g], top)
        s_raw[g] /= total
        for i in range(P):
            s[i, g] /= total
    out[:] = 0.0
    for i in range(P):
        first = page[i] * pages.stride
        if v_token.bits:
            token_combine(v_token, pages, first, head, H, kind, s[i], out[0])
        else:
            channel_combine(v_channel, pages, first, head, kind, s[i], out[0])
    for t in range(T):
        for g in range(G):
            weight = s_raw[g, t]
            for d in range(D):
                out[1, g, d] += weight * raw[t, D + d]


@jit
def _attend_all(
    k: Channel,
    v_channel: Channel,
    v_token: Token,
    pages: Views,
    local: Views,
    page: np.ndarray,
    page_start: np.ndarray,
    block: np.ndarray,
    mask: np.ndarray,
    kind: int,
    sink_tokens: int,
    q: np.ndarray,
    out: np.ndarray,
    first: int,
    last: int,
) -> None:
    """Work items `first` to `last` of N requests times H heads."""
    H = q.shape[1]
    for item in range(first, last):
        n, head = item // H, item % H
        _attend(
            k,
            v_channel,
            v_token,
            pages,
            local,
            page[page_start[n] : page_start[n + 1]],
            block[n],
            mask[n],
            H,
            head,
            kind,
            sink_tokens,
            q[n, head],
            out[n, head],
        )


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
    items, threads = N * H, min(torch.get_num_threads(), N * H)
    if threads == 1:
        _attend_all(*arguments, 0, items)
    else:
        bounds = [items * i // threads for i in range(threads + 1)]
        list(
            _pool(threads).map(lambda a, b: _attend_all(*arguments, a, b), bounds[:-1], bounds[1:])
        )
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
    return ThreadPoolExecutor(threads)
