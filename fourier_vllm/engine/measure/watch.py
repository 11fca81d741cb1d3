"""Lets attention layers of vLLM run on prompts without caches, and be looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

QUERIES_AT_ONCE = 512  # where scores are masked

Observe = Callable[[str, Tensor, Tensor, Tensor, Tensor], Tensor]


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, sliding_window: int | None = None
) -> Tensor:
    """Causal attention of one prompt over itself.

    Parameters
    ----------
    q : Tensor [T, Hq, D]
    k, v : Tensor [T, H, D]
    scale : float
        Of the scores.
    sliding_window : int, optional
        Tokens that a query reads, its own among them.

    Returns
    -------
    Tensor [T, Hq, D]
    """
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    tokens = q.shape[2]
    if sliding_window is None or sliding_window >= tokens:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)
    parts = []
    for start in range(0, tokens, QUERIES_AT_ONCE):
        end = min(start + QUERIES_AT_ONCE, tokens)
        first = max(0, start - sliding_window + 1)
        ages = torch.arange(start, end, device=q.device)[:, None]
        ages = ages - torch.arange(first, end, device=q.device)
        parts.append(
            scaled_dot_product_attention(
                q[:, :, start:end],
                k[:, :, first:end],
                v[:, :, first:end],
                attn_mask=(ages >= 0) & (ages < sliding_window),
                scale=scale,
                enable_gqa=True,
            )
        )
    return torch.cat(parts, 2)[0].transpose(0, 1)


def change_by_pages(
    q: Tensor,
    raw: tuple[Tensor, Tensor],
    paged: tuple[Tensor, Tensor],
    from_pages: Tensor,
    scale: float,
) -> Tensor:
    """What causal attention gives more where queries read some of the tokens from pages.

    Parameters
    ----------
    q : Tensor [T, Hq, D]
    raw, paged : pair of Tensor [T, H, D]
        Keys and values as they are, and as pages give them back.
    from_pages : Tensor [T, T] bool
        Tokens that a query reads from pages, all of them before it.
    scale : float
        Of the scores.

    Returns
    -------
    Tensor [T, Hq, D], float32
        Zeros for queries that read nothing from pages.
    """
    causal = torch.ones_like(from_pages).tril()
    mask = torch.cat([causal & ~from_pages, from_pages], 1)
    query = q.float().transpose(0, 1)[None]

    def attended(second: tuple[Tensor, Tensor]) -> Tensor:
        k, v = (
            torch.cat(both).float().transpose(0, 1)[None] for both in zip(raw, second, strict=True)
        )
        parts = [
            scaled_dot_product_attention(few, k, v, attn_mask=some, scale=scale, enable_gqa=True)
            for few, some in zip(
                query.split(QUERIES_AT_ONCE, 2), mask.split(QUERIES_AT_ONCE), strict=True
            )
        ]
        return torch.cat(parts, 2)[0].transpose(0, 1)

    return attended(paged) - attended(raw)


@contextmanager
def watched(layers: Mapping[str, Any], observe: Observe) -> Iterator[None]:
    """Run the layers' attention over one prompt at a time, and no cache.

    Parameters
    ----------
    layers : mapping of str to vllm Attention
        All attention layers that the model has here, by name.
    observe : callable
        Gets a layer's name, `q [T, Hq, D]`, `k` and `v [T, H, D]` and the output `[T, Hq, D]`; returns the
        output that the model goes on with.
    """

    def forward_of(name: str, layer: Any) -> Callable[..., Tensor]:
        def forward(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            output_shape: torch.Size | None = None,
            output_dtype: torch.dtype | None = None,
        ) -> Tensor:
            q = query.view(-1, layer.num_heads, layer.head_size)
            k = key.view(-1, layer.num_kv_heads, layer.head_size)
            v = value.view(-1, layer.num_kv_heads, layer.head_size)
            out = observe(name, q, k, v, attend(q, k, v, layer.impl.scale, layer.sliding_window))
            out = out.to(output_dtype or query.dtype)
            return out.reshape(output_shape or (len(q), -1))

        return forward

    for name, layer in layers.items():
        layer.forward = forward_of(name, layer)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.forward  # the instance's, which hid that of its class
