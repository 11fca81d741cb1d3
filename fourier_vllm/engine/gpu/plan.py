"""What a step on a GPU does, from what the host knows; lengths of decoding requests stay on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import torch

from fourier_vllm.engine.metadata import FourierMetadata
from fourier_vllm.kernels.gpu.bounds import read_bounds
from fourier_vllm.kernels.gpu.step import Step
from fourier_vllm.page import align
from fourier_vllm.window import Window


@dataclass
class Piece:
    """Consecutive prefilled requests over their keys, or one request over a stretch of its keys.

    Attributes
    ----------
    first_row : int
        The first request's place in the batch.
    queries : slice
        Their tokens of this step.
    query_lens, key_lens : list of int
        One a request.
    begin : int
        First token of the stretch.
    is_last : bool
        The keys end with the queries themselves.
    query_starts, key_starts : torch.Tensor
        `[n + 1]` int32, where each request begins, and the end.
    """

    first_row: int
    queries: slice
    query_lens: list[int]
    key_lens: list[int]
    begin: int = 0
    is_last: bool = True
    query_starts: torch.Tensor = field(init=False)
    key_starts: torch.Tensor = field(init=False)


@dataclass
class GpuPlan:
    """Requests with one query token come first; the others are prefilled.

    Attributes
    ----------
    step : Step
        All requests.
    decodes : Step
        Those with one query token.
    pieces : list of Piece
        Stretches of one request are neighbours, the last one last.
    in_flight : bool
        No prefilled request has tokens before this step.
    """

    num_decodes: int
    step: Step
    decodes: Step
    pieces: list[Piece] = field(default_factory=list)
    in_flight: bool = True


def plan_step(
    window: Window,
    pages: FourierMetadata,
    local: FourierMetadata,
    num_tokens: int,
    capacity: int,
) -> GpuPlan:
    """Plan a step, for all layers that share both tables.

    Parameters
    ----------
    pages, local : FourierMetadata
        Of the two caches.
    num_tokens : int
        Of the step, padding included.
    capacity : int
        Keys of a piece, at most; a multiple of the page size, and a page more than a step has tokens.
    """
    query_lens = pages.query_start_loc_cpu.diff()
    single = query_lens <= 1
    if window.exact_prefill:
        single &= ~pages.is_prefilling
    n, num_decodes = len(query_lens), int(single.int().cumprod(0).sum())
    num_pages, gap_pages = torch.empty(2, n, dtype=torch.int32, device=pages.seq_lens.device)
    is_exact = None
    if window.exact_prefill and num_decodes < n:
        is_exact = pages.is_prefilling.to(num_pages.device, non_blocking=True)
    if n:
        read_bounds(
            pages.seq_lens,
            pages.query_start_loc,
            local.block_table,
            window.local_window,
            window.page_size,
            window.block_size,
            window.num_pinned_blocks,
            is_exact,
            num_pages,
            gap_pages,
        )
    step = Step(
        pages.seq_lens,
        pages.query_start_loc,
        pages.block_table,
        local.block_table,
        local.slot_mapping[:num_tokens],
        num_pages,
        gap_pages,
        window,
    )
    plan = GpuPlan(num_decodes, step, step.first(num_decodes))
    if num_decodes < n:
        known = pages.seq_lens_cpu  # exact for requests that are prefilled
        seq_lens = (pages.seq_lens.cpu() if known is None else known)[num_decodes:]
        lens = query_lens[num_decodes:]
        plan.in_flight = bool((seq_lens <= lens).all())
        plan.pieces = cut(
            num_decodes,
            int(pages.query_start_loc_cpu[num_decodes]),
            lens.tolist(),
            # Padding has no queries, and shall have no keys.
            torch.where(lens > 0, seq_lens, 0).tolist(),
            capacity,
            window.page_size,
        )
        _send(plan.pieces, pages.seq_lens.device)
    return plan


def cut(
    row: int,
    token: int,
    query_lens: list[int],
    key_lens: list[int],
    capacity: int,
    page_size: int,
) -> list[Piece]:
    """Pieces of the requests from `row` on, whose queries begin at `token`."""
    pieces: list[Piece] = []
    room = -1
    for num_queries, num_keys in zip(query_lens, key_lens, strict=True):
        queries = slice(token, token + num_queries)
        if num_keys > capacity:
            # The last stretch has all of the step's own tokens.
            last = align(num_keys - capacity, page_size)
            for begin in range(0, last, capacity):
                n = min(capacity, last - begin)
                pieces.append(Piece(row, queries, [num_queries], [n], begin, is_last=False))
            pieces.append(Piece(row, queries, [num_queries], [num_keys - last], last))
            room = -1
        elif num_keys > room:
            pieces.append(Piece(row, queries, [num_queries], [num_keys]))
            room = capacity - num_keys
        else:
            piece = pieces[-1]
            piece.queries = slice(piece.queries.start, queries.stop)
            piece.query_lens.append(num_queries)
            piece.key_lens.append(num_keys)
            room -= num_keys
        row, token = row + 1, queries.stop
    return pieces


def _send(pieces: list[Piece], device: torch.device) -> None:
    """Put where requests begin on the device, all in one copy."""
    lens = [x for piece in pieces for x in (piece.query_lens, piece.key_lens)]
    starts = torch.tensor([x for row in lens for x in (0, *accumulate(row))], dtype=torch.int32)
    sent = starts.to(device, non_blocking=True).split([len(row) + 1 for row in lens])
    for i, piece in enumerate(pieces):
        piece.query_starts, piece.key_starts = sent[2 * i : 2 * i + 2]
