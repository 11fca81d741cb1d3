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
