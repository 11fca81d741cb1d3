"""What one engine step does to the two caches of a layer, worked out once and shared by all layers.

Positions only: which tokens are stored, which pages are completed and sealed, what every request reads
raw and what from pages. Running it (`engine/cpu/path.py`) is index arithmetic plus the codec.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fourier_vllm.window import Window


@dataclass
class Cells:
    """Cells of the local cache: `block` and `offset`, same shape."""

    block: torch.Tensor
    offset: torch.Tensor


@dataclass
class SealStep:
    """Pages completed in this step: P pages of W tokens."""

    page: torch.Tensor  # [P] block ids of the page cache
    token: torch.Tensor  # [P, W] index of each token in this step's keys, where it is in flight
    in_flight: torch.Tensor  # [P, W] bool
    cells: Cells  # [P, W] where the other tokens lie
    num_pinned: torch.Tensor  # [P] leading sink tokens of the page


@dataclass
class DecodeStep:
    """Requests with one query token: N rows, P sealed pages among them, B raw blocks a row."""

    query: torch.Tensor  # [N] row of each request's query
    page: torch.Tensor  # [P]
    page_start: torch.Tensor  # [N + 1] where each request's pages begin
    block: torch.Tensor  # [N, B] raw blocks, pinned ones first
    raw_mask: torch.Tensor  # [N, B * block_size] bool, True where a token is read


@dataclass
class PrefillStep:
    """One request with several query tokens `start:stop`, attending its context and itself."""

    start: int
    stop: int
    page: torch.Tensor  # [P]
    num_skipped: int  # sink tokens of the first page, read raw instead
    cells: Cells  # [C]


@dataclass
class StepPlan:
    """All of a step. `store` and `store_cells` are the tokens that go to the local cache."""

    store: torch.Tensor  # [n]
    store_cells: Cells  # [n]
    seal: SealStep | None
    decode: DecodeStep | None
    prefill: list[PrefillStep]


def raw_starts(
    window: Window,
    context_lens: torch.Tensor,
    is_prefilling: torch.Tensor,
    local_table: torch.Tensor,
) -> torch.Tensor:
    """First token that each request reads raw (behind the sinks), a multiple of the page size.

    While decoding, the page-aligned start of the local window; in an exact prefill, the prompt's first
    token. Either way not before the last null block: those are cached pages whose raw tokens are gone.

    Parameters
    ----------
    context_lens : torch.Tensor
        `[N]`, tokens before this step.
    is_prefilling : torch.Tensor
        `[N]` bool.
    local_table : torch.Tensor
        `[N, blocks]`, block table of the local cache.
    """
    W, bs = window.page_size, window.block_size
    start = window.pages_before(context_lens + 1) * W
    if window.exact_prefill:
        start = torch.where(is_prefilling, 0, start)
    index = torch.arange(local_table.shape[1], device=local_table.device)
    is_gap = (local_table == 0) & (index >= window.num_pinned_blocks)
    is_gap &= (index >= start[:, None] // bs) & (index * bs < context_lens[:, None])
    gap_end = torch.where(is_gap, (index + 1) * bs, 0).amax(1)
    return torch.maximum(start, (gap_end + W - 1) // W * W)


def _cells(table: torch.Tensor, positions: torch.Tensor, block_size: int) -> Cells:
    """Cells of `positions [N, T]` through `table [N, blocks]`."""
    return Cells(table.gather(1, positions // block_size).long(), positions % block_size)


def plan_tokens(
    window: Window,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    is_prefilling: torch.Tensor,
    page_table: torch.Tensor,
    local_table: torch.Tensor,
    local_slots: torch.Tensor,
) -> StepPlan:
    """Plan a step.

    Parameters
    ----------
    query_start_loc : torch.Tensor
        `[N + 1]`, vLLM's.
    seq_lens : torch.Tensor
        `[N]`, tokens including this step's.
    is_prefilling : torch.Tensor
        `[N]` bool.
    page_table, local_table : torch.Tensor
        `[N, *]`, block tables of the two caches.
    local_slots : torch.Tensor
        `[tokens]`, slot mapping of the local cache; block 0 and negative slots are not stored.
    """
    device = seq_lens.device
    W, bs = window.page_size, window.block_size
    query_start_loc = query_start_loc.long()
    query_lens = query_start_loc.diff()
    seq_lens = seq_lens.long()
    context_lens = seq_lens - query_lens
    num_tokens = int(query_start_loc[-1])

    slots = local_slots[:num_tokens].long()
    store = (slots >= bs).nonzero()[:, 0]
    store_cells = Cells(slots[store] // bs, slots[store] % bs)

    raw = raw_starts(window, context_lens, is_prefilling, local_table)
    single = (query_lens == 1) & ~(is_prefilling & window.exact_prefill)
    decode = None
    if bool(single.any()):
        rows = single.nonzero()[:, 0]
        decode = _plan_decode(
            window,
            query_start_loc[:-1][rows],
            seq_lens[rows],
            raw[rows],
            page_table[rows],
            local_table[rows],
        )
    prefill = [
        _plan_prefill(
            window,
            int(query_start_loc[i]),
            int(query_start_loc[i + 1]),
            int(context_lens[i]),
            int(raw[i]),
            page_table[i],
            local_table[i : i + 1],
        )
        for i in ((query_lens > 0) & ~single).nonzero()[:, 0].tolist()
    ]

    first = context_lens // W
    index = torch.arange(page_table.shape[1], device=device)
    done = (index >= first[:, None]) & (index < (seq_lens // W)[:, None])
    done &= (query_lens > 0)[:, None]
    seal = None
    if bool(done.any()):
        row, page = done.nonzero(as_tuple=True)
        positions = page[:, None] * W + torch.arange(W, device=device)
        behind = positions - context_lens[row, None]
        seal = SealStep(
            page=page_table[row, page].long(),
            token=query_start_loc[row, None] + behind.clamp_min(0),
            in_flight=behind >= 0,
            cells=_cells(local_table[row], positions, bs),
            num_pinned=torch.where(page == 0, window.sink_tokens, 0),
        )
    return StepPlan(store, store_cells, seal, decode, prefill)


def _plan_decode(
    window: Window,
    query: torch.Tensor,
    seq_lens: torch.Tensor,
    raw: torch.Tensor,
    page_table: torch.Tensor,
    local_table: torch.Tensor,
) -> DecodeStep:
    bs = window.block_size
    num_pages = raw // window.page_size
    used = torch.arange(page_table.shape[1], device=raw.device)[None] < num_pages[:, None]
    pinned = torch.arange(window.num_pinned_blocks, device=raw.device).expand(len(raw), -1)
    last = (seq_lens[:, None] - 1) // bs
    recent = raw[:, None] // bs
    recent = recent + torch.arange(int((last - recent).max()) + 1, device=raw.device)
    index = torch.cat([pinned, recent], 1)  # [N, B]
    offset = torch.arange(bs, device=raw.device)
    # With no page sealed the recent tokens include the sinks.
    sinks = (pinned[..., None] * bs + offset < window.sink_tokens) & (raw > 0)[:, None, None]
    mask = torch.cat([sinks, recent[..., None] * bs + offset < seq_lens[:, None, None]], 1)
    return DecodeStep(
        query=query,
        page=page_table[used].long(),
        page_start=torch.nn.functional.pad(num_pages.cumsum(0), (1, 0)),
        block=local_table.gather(1, torch.minimum(index, last)).long(),
        raw_mask=mask.flatten(1),
    )


def _plan_prefill(
    window: Window,
    start: int,
    stop: int,
    context_len: int,
    raw: int,
    page_table: torch.Tensor,
    local_table: torch.Tensor,
) -> PrefillStep:
    recent = torch.arange(raw, context_len, device=page_table.device)
    sinks = torch.arange(window.sink_tokens if raw else 0, device=page_table.device)
    cells = _cells(local_table, torch.cat([sinks, recent])[None], window.block_size)
    return PrefillStep(
        start=start,
        stop=stop,
        page=page_table[: raw // window.page_size].long(),
        num_skipped=len(sinks),
        cells=Cells(cells.block[0], cells.offset[0]),
    )
