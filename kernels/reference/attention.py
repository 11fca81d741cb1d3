"""Attention over sealed pages and raw tokens in plain PyTorch: ground truth, and the CPU path."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fourier_vllm.kernels.reference.codec import PageCodec

# Query rows a block: bounds the mask of a long chunk against a long context.
QUERY_BLOCK = 256


def decode_attention(
    codec: PageCodec,
    q: torch.Tensor,
    pages: torch.Tensor,
    page_row: torch.Tensor,
    page_slot: torch.Tensor,
    max_pages: int,
    sink_tokens: int,
    k_raw: torch.Tensor,
    v_raw: torch.Tensor,
    raw_mask: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """One query token a request over its sealed pages and raw tokens, one softmax over both.

    Parameters
    ----------
    q : torch.Tensor
        `[N, H, G, D]`.
    pages : torch.Tensor
        `[P, page_bytes]` uint8, pages of all requests.
    page_row, page_slot : torch.Tensor
        `[P]`, request of a page, and its index in the request.
    sink_tokens : int
        Leading tokens of a request's first page that are among the raw ones instead.
    k_raw, v_raw : torch.Tensor
        `[N, H, T, D]` float32; padding must be finite.
    raw_mask : torch.Tensor
        `[N, T]` bool, False for padding.

    Returns
    -------
    torch.Tensor
        `[N, H, G, D]` float32.
    """
    N, H, G, D = q.shape
    W, T = codec.layout.page_size, k_raw.shape[2]
    q = q.float() * scale
    s = q.new_full((N, H, G, max_pages * W + T), float("-inf"))
    s_page = s[..., : max_pages * W].unflatten(3, (max_pages, W))  # [N, H, G, pages, W]
    s_page[page_row, :, :, page_slot] = codec.k.scores(q, page_row, pages)
    s[..., : min(sink_tokens, max_pages * W)] = float("-inf")  # these are among the raw ones
    s[..., max_pages * W :] = q @ k_raw.transpose(2, 3)
    s[..., max_pages * W :].masked_fill_(~raw_mask[:, None, None], float("-inf"))
    p = s.softmax(-1)
    p_page = p[..., : max_pages * W].unflatten(3, (max_pages, W))
    out = q.new_zeros(N, H, G, D)
    out.index_add_(0, page_row, codec.v.combine(p_page[page_row, :, :, page_slot], pages))
    return codec.v.finish(out) + p[..., max_pages * W :] @ v_raw


def prefill_attention(
    q: torch.Tensor,
    k_context: torch.Tensor,
    v_context: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """A chunk of query tokens over its whole context and, causally, over itself.

    Parameters
    ----------
    q : torch.Tensor
        `[T, Hq, D]`.
    k_context, v_context : torch.Tensor
        `[C, H, D]`, tokens before the chunk, in any order unless `window` is given.
    k, v : torch.Tensor
        `[T, H, D]`, the chunk's own.
    window : int, optional
        Sliding window: a query reads its last `window` tokens, itself included.

    Returns
    -------
    torch.Tensor
        `[T, Hq, D]`, dtype of `q`.
    """
    T, C = q.shape[0], k_context.shape[0]
    k_all = torch.cat([k_context.to(q.dtype), k]).transpose(0, 1)[None]
    v_all = torch.cat([v_context.to(q.dtype), v]).transpose(0, 1)[None]
    q_all = q.transpose(0, 1)[None]
    blocks = []
    for begin in range(0, T, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, T)
        low = 0 if window is None else max(0, C + begin - window + 1)
        key = torch.arange(low, C + end, device=q.device)
        query = torch.arange(C + begin, C + end, device=q.device)[:, None]
        mask = key <= query
        if window is not None:
            mask &= key > query - window
        blocks.append(
            F.scaled_dot_product_attention(
                q_all[:, :, begin:end],
                k_all[:, :, low : C + end],
                v_all[:, :, low : C + end],
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )
        )
    return torch.cat(blocks, 2)[0].transpose(0, 1)
