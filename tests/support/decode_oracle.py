"""Decode attention of the CPU's path in plain PyTorch, on any device and in both orders of a page."""

from __future__ import annotations

import torch

from fourier_vllm.engine.cpu.plan import DecodeStep
from fourier_vllm.kernels.reference.attention import decode_attention
from fourier_vllm.kernels.reference.codec import PageCodec


def load_blocks(local: torch.Tensor, block: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """K and V of whole blocks `[N, B]`, `[N, H, B * block_size, 2 * D]` float32, zero outside `mask`.

    What is not read may be anything, NaN included, and NaN times a weight of zero is NaN.
    """
    raw = local.index_select(0, block.flatten()).unflatten(0, block.shape)
    raw = raw.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format).flatten(2, 3)
    return raw.masked_fill_(~mask[:, None, :, None], 0.0)


def attend_decodes(
    codec: PageCodec,
    step: DecodeStep,
    q: torch.Tensor,
    pages: torch.Tensor,
    local: torch.Tensor,
    scale: float,
    sink_tokens: int,
) -> torch.Tensor:
    """What `fourier_vllm.engine.cpu.path.attend_decodes` computes."""
    num_pages = step.page_start.diff()
    row = torch.arange(len(num_pages), device=q.device).repeat_interleave(num_pages)
    slot = torch.arange(len(row), device=q.device) - step.page_start[row]
    k_raw, v_raw = load_blocks(local, step.block, step.raw_mask).chunk(2, -1)
    return decode_attention(
        codec,
        q[step.query].unflatten(1, (local.shape[1], -1)),
        pages.index_select(0, step.page),
        row,
        slot,
        int(num_pages.max()),
        sink_tokens,
        k_raw,
        v_raw,
        step.raw_mask,
        scale,
    )
