"""What a step on a GPU does, from what the host knows; lengths of decoding requests stay on the device."""

from __future__ import annotations

from dataclasses import dataclass

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
    max_prefill : int
        Query tokens of a prefilled request, at most.
    fresh : bool
        No prefilled request has tokens before this step.
    raw : bool
        All tokens of all prefilled requests are in the local cache, this step's included, and are
        attended there.
    prefill : list of PrefillStep
        One a request, unless `fresh` or `raw`.
    """

    num_decodes: int
    num_pages: torch.Tensor
    gap_pages: torch.Tensor
    first_prefill: int
    max_prefill: int
    max_seq_len: int
    fresh: bool
    raw: bool
    prefill: list[PrefillStep]


def make_plan(
    window: Window, pages: FourierMetadata, local: FourierMetadata, reads_blocks: bool
) -> GpuPlan:
    """Plan a step of a layer.

    Parameters
    ----------
    pages, local : FourierMetadata
        Of the two caches.
    reads_blocks : bool
        Prefill attention can read the local cache's blocks.
    """
    query_lens = pages.query_start_loc_cpu.diff()
    single = query_lens <= 1
    if window.exact_prefill and pages.is_prefilling_cpu is not None:
        single &= ~pages.is_prefilling_cpu
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
    plan = GpuPlan(
        num_decodes=num_decodes,
        num_pages=num_pages,
        gap_pages=gap_pages,
        first_prefill=int(pages.query_start_loc_cpu[num_decodes]),
        max_prefill=int(query_lens[num_decodes:].max()) if num_decodes < len(query_lens) else 0,
        max_seq_len=0,
        fresh=True,
        raw=False,
        prefill=[],
    )
    if plan.max_prefill:
        _add_prefill(plan, window, pages, local, query_lens[num_decodes:], reads_blocks)
    return plan


def _add_prefill(
    plan: GpuPlan,
    window: Window,
    pages: FourierMetadata,
    local: FourierMetadata,
    query_lens: torch.Tensor,
    reads_blocks: bool,
) -> None:
    rows = slice(plan.num_decodes, None)
    known = pages.seq_lens_cpu  # exact for requests that are prefilled
    seq_lens = (pages.seq_lens.cpu() if known is None else known)[rows]
    context = seq_lens - query_lens
    plan.max_seq_len = int(seq_lens.max())
    plan.fresh = not bool(context.any())
    if plan.fresh:
        return
    device_lens = pages.seq_lens[rows] - pages.query_start_loc[plan.num_decodes :].diff()
    starts = raw_starts(
        window,
        device_lens.long(),
        torch.ones_like(device_lens, dtype=torch.bool),
        local.block_table[rows],
    ).tolist()
    # Otherwise a chunk's tokens are stored only where they outlive it.
    plan.raw = window.exact_prefill and reads_blocks and not any(starts)
    if plan.raw:
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
