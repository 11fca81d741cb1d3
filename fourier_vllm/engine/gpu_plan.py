"""What a step on a GPU does, from what the host knows; lengths of decoding requests stay on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from fourier_vllm.engine.metadata import FourierMetadata
from fourier_vllm.engine.plan import PrefillStep, Window, plan_prefill, raw_starts
from fourier_vllm.kernels.read_bounds import read_bounds


@dataclass
class GpuPlan:
    """Requests with one query token come first, N of them; the others are prefilled.

    Attributes
    ----------
    num_pages, gap_pages : torch.Tensor
        `[N]` int32, see `kernels.decode.attend_pages`.
    first_prefill : int
        First query token of the prefilled requests.
    prefill_starts : torch.Tensor
        Where each of them begins behind it, and the end, int32.
    max_prefill, max_seq_len : int
        Query tokens, and tokens, of a prefilled request, at most.
    at_once : str, optional
        All prefilled requests are one call of FlashAttention: over keys in "flight", none having tokens
        before this step, or over "blocks" of the local cache, which has all their tokens.
    prefill : list of PrefillStep
        One a request otherwise.
    """

    num_decodes: int
    num_pages: torch.Tensor
    gap_pages: torch.Tensor
    first_prefill: int
    prefill_starts: torch.Tensor
    max_prefill: int = 0
    max_seq_len: int = 0
    at_once: Literal["flight", "blocks"] | None = None
    prefill: list[PrefillStep] = field(default_factory=list)


def make_plan(
    window: Window, pages: FourierMetadata, local: FourierMetadata, has_flash: bool
) -> GpuPlan:
    """Plan a step of a layer.

    Parameters
    ----------
    pages, local : FourierMetadata
        Of the two caches.
    has_flash : bool
        Prompts go through FlashAttention.
    """
    query_lens = pages.query_start_loc_cpu.diff()
    single = query_lens <= 1
    if window.exact_prefill:
        single &= ~pages.is_prefilling
    num_decodes = int(single.int().cumprod(0).sum())
    num_pages, gap_pages = torch.empty(
        2, num_decodes, dtype=torch.int32, device=pages.seq_lens.device
    )
    if num_decodes:
        read_bounds(
            pages.seq_lens[:num_decodes],
            pages.query_start_loc[: num_decodes + 1],
            local.block_table,
            window.local_window,
            window.page_size,
            window.block_size,
            window.num_pinned_blocks,
            num_pages,
            gap_pages,
        )
    first = int(pages.query_start_loc_cpu[num_decodes])
    starts = pages.query_start_loc[num_decodes:]
    plan = GpuPlan(num_decodes, num_pages, gap_pages, first, starts)
    if num_decodes < len(query_lens):
        plan.prefill_starts = starts - first
        _add_prefill(plan, window, pages, local, query_lens[num_decodes:], has_flash)
    return plan


def _add_prefill(
    plan: GpuPlan,
    window: Window,
    pages: FourierMetadata,
    local: FourierMetadata,
    query_lens: torch.Tensor,
    has_flash: bool,
) -> None:
    rows = slice(plan.num_decodes, None)
    known = pages.seq_lens_cpu  # exact for requests that are prefilled
    seq_lens = (pages.seq_lens.cpu() if known is None else known)[rows]
    context = seq_lens - query_lens
    plan.max_prefill, plan.max_seq_len = int(query_lens.max()), int(seq_lens.max())
    starts = [0] * len(context)
    if bool(context.any()):
        lens = pages.seq_lens[rows] - plan.prefill_starts.diff()
        table = local.block_table[rows]
        starts = raw_starts(
            window, lens.long(), torch.ones_like(lens, dtype=torch.bool), table
        ).tolist()
        # Otherwise a chunk's tokens are stored only where they outlive it.
        has_blocks = window.exact_prefill and window.block_size % 16 == 0 and not any(starts)
        plan.at_once = "blocks" if has_flash and has_blocks else None
    elif has_flash:
        plan.at_once = "flight"
    if plan.at_once is not None:
        return
    begins = pages.query_start_loc_cpu[rows].tolist()
    for i, (begin, start, length) in enumerate(zip(begins, starts, context.tolist(), strict=False)):
        if begins[i + 1] == begin:
            continue
        row = plan.num_decodes + i
        plan.prefill.append(
            plan_prefill(
                window,
                begin,
                begins[i + 1],
                length,
                start,
                pages.block_table[row],
                local.block_table[row : row + 1],
            )
        )
