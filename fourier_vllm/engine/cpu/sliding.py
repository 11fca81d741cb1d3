"""Layers with a sliding window of their own (Gemma 3): nothing to compress, plain paged attention."""

from __future__ import annotations

import torch

from fourier_vllm.engine.cpu.cells import load, store
from fourier_vllm.engine.cpu.plan import Cells
from fourier_vllm.engine.metadata import FourierMetadata
from fourier_vllm.kernels.reference.attention import prefill_attention


def run_step(
    metadata: FourierMetadata,
    window: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: torch.Tensor,
    scale: float,
    output: torch.Tensor,
) -> None:
    """One sliding-window layer of one step.

    Parameters
    ----------
    window : int
        Tokens a query reads, itself included.
    q, output : torch.Tensor
        `[T, Hq, D]`.
    k, v : torch.Tensor
        `[T, H, D]`.
    cache : torch.Tensor
        `[blocks, H, block_size, 2 * D]`.
    """
    size = cache.shape[2]
    starts = metadata.query_start_loc.tolist()
    slots = metadata.slot_mapping[: starts[-1]].long()
    kept = (slots >= size).nonzero()[:, 0]
    store(cache, Cells(slots[kept] // size, slots[kept] % size), k[kept], v[kept])
    for i, seq_len in enumerate(metadata.seq_lens.tolist()):
        chunk = slice(starts[i], starts[i + 1])
        context_len = seq_len - (chunk.stop - chunk.start)
        if chunk.start == chunk.stop:
            continue
        position = torch.arange(max(0, context_len - window + 1), context_len, device=q.device)
        block = metadata.block_table[i][position // size].long()
        k_context, v_context = load(cache, Cells(block, position % size))
        output[chunk] = prefill_attention(
            q[chunk], k_context, v_context, k[chunk], v[chunk], scale, window
        ).to(output.dtype)
