"""Reads and writes cells of the local cache with plain index arithmetic."""

from __future__ import annotations

import torch

from fourier_vllm.engine.cpu.plan import Cells


def store(local: torch.Tensor, cells: Cells, k: torch.Tensor, v: torch.Tensor) -> None:
    """Write `k, v [n, H, D]` into `local [blocks, H, block_size, 2 * D]`."""
    local[cells.block, :, cells.offset] = torch.cat([k, v], -1).to(local.dtype)


def load(local: torch.Tensor, cells: Cells) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of `cells [...]`, each `[..., H, D]`."""
    k, v = local[cells.block, :, cells.offset].chunk(2, -1)
    return k, v


def load_blocks(local: torch.Tensor, block: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """K and V of whole blocks `[N, B]`, `[N, H, B * block_size, 2 * D]` float32, zero outside `mask`.

    What is not read may be anything, NaN included, and NaN times a weight of zero is NaN.
    """
    raw = local.index_select(0, block.flatten()).unflatten(0, block.shape)
    raw = raw.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format).flatten(2, 3)
    return raw.masked_fill_(~mask[:, None, :, None], 0.0)
