"""A worker that keeps stamps in the cells of the two caches.

A stamp stands for what a cell holds: a hash of a token and everything before it. The worker follows
vLLM's V1 runner: block tables grow, freed entries stay as stale ids, resumed requests start over.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.v1.request import Request

from fourier_vllm.engine.cpu.plan import Cells, StepPlan, plan_tokens
from fourier_vllm.window import Window

POISON = -1


PAGE_GROUP, LOCAL_GROUP = 0, 1


def next_token(stamp: int) -> int:
    """Greedy sampling: the same prefix always continues in the same way."""
    return stamp % 500


class Tokens:
    """Tokens of a request and their stamps, as many as are asked for."""

    def __init__(self, prompt: list[int]) -> None:
        self.ids = list(prompt)
        self._stamps: list[int] = []

    def stamps(self, n: int) -> np.ndarray:
        for i in range(len(self._stamps), n):
            if i == len(self.ids):
                self.ids.append(next_token(self._stamps[-1]))
            before = self._stamps[-1] if i else 0
            self._stamps.append(hash((before, self.ids[i])) & (2**62 - 1))
        return np.array(self._stamps[:n], dtype=np.int64)


class ReadError(AssertionError):
    """A cell did not hold what a step read from it."""


def expect(good: Any, message: str) -> None:
    if not good:
        raise ReadError(message)


@dataclass
class Row:
    """What the worker knows of a request."""

    tokens: Tokens
    num_prompt: int
    prefill_len: int
    blocks: list[list[int]]
    num_computed: int


@dataclass
class Worker:
    """Executes scheduler outputs on stamps; raises `ReadError` where a read is not what it must be.

    `runner` is "v1" (prefilling: inside the prompt) or "v2" (until all tokens known at admission).
    `nulled_below` has, for each cache group, the `num_retained_tokens` that vLLM 0.33's V2 runner acts on.
    """

    window: Window
    num_blocks: int
    max_model_len: int
    runner: str = "v1"
    seed: int = 0
    nulled_below: tuple[int, int] = (0, 0)
    rows: dict[str, Row] = field(default_factory=dict)
    num_steps: int = 0
    num_null_reads: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.stale = np.random.default_rng(self.seed)
        # A block id is one piece of memory, whichever cache uses it.
        self.page = np.full((self.num_blocks, self.window.page_size), POISON, np.int64)
        self.local = np.full((self.num_blocks, self.window.block_size), POISON, np.int64)

    def poison(self, ids: list[int]) -> None:
        self.page[ids] = POISON
        self.local[ids] = POISON

    def update(self, output: Any, requests: dict[str, Request]) -> None:
        """vLLM's `_update_states`, as far as block tables are concerned."""
        for name in output.finished_req_ids:
            self.rows.pop(name, None)
        for new in output.scheduled_new_reqs:
            self.rows[new.req_id] = Row(
                tokens=Tokens(new.prompt_token_ids),
                num_prompt=len(new.prompt_token_ids),
                prefill_len=len(new.prompt_token_ids),
                blocks=[list(ids) for ids in new.block_ids],
                num_computed=new.num_computed_tokens,
            )
        cached = output.scheduled_cached_reqs
        for i, name in enumerate(cached.req_ids):
            row, ids = self.rows[name], cached.new_block_ids[i]
            row.num_computed = cached.num_computed_tokens[i]
            if name in cached.resumed_req_ids:
                row.blocks = [list(x) for x in ids]
                row.prefill_len = requests[name].num_tokens
            elif ids is not None:
                for table, new_ids in zip(row.blocks, ids, strict=True):
                    table.extend(new_ids)

    def _table(self, rows: list[Row], group: int, block_size: int) -> torch.Tensor:
        """Block table with, behind each row, ids of whoever had that row before."""
        width = -(-self.max_model_len // block_size)
        table = self.stale.integers(self.num_blocks, size=(len(rows), width), dtype=np.int32)
        for i, row in enumerate(rows):
            expect(len(row.blocks[group]) <= width, "a table is longer than the model allows")
            table[i, : len(row.blocks[group])] = row.blocks[group]
            if self.nulled_below[group]:  # `_gather_block_tables_kernel` of vLLM 0.33
                reach = max(row.num_computed - self.nulled_below[group], 0)
                table[i, : min(reach // block_size, len(row.blocks[group]))] = 0
        return torch.from_numpy(table)

    def execute(self, output: Any, requests: dict[str, Request]) -> None:
        """One forward pass of one layer: plan, store, seal, attend."""
        self.update(output, requests)
        counts = output.num_scheduled_tokens
        if not counts:
            return
        self.num_steps += 1
        names = list(counts)
        self.random.shuffle(names)
        rows = [self.rows[name] for name in names]
        W, bs = self.window.page_size, self.window.block_size
        starts = np.cumsum([0] + [counts[name] for name in names])
        context = [row.num_computed for row in rows]
        lens = [c + counts[name] for c, name in zip(context, names, strict=True)]
        stamps = [row.tokens.stamps(n) for row, n in zip(rows, lens, strict=True)]
        self.now = np.concatenate([s[c:] for s, c in zip(stamps, context, strict=True)])
        limits = [row.num_prompt if self.runner == "v1" else row.prefill_len for row in rows]
        prefilling = [c < limit for c, limit in zip(context, limits, strict=True)]
        slots = []
        for row, c, n in zip(rows, context, lens, strict=True):
            table = np.array(row.blocks[LOCAL_GROUP])
            position = np.arange(c, n)
            slots.append(table[position // bs] * bs + position % bs)
        # Padding of CUDA graphs: rows without tokens, slots that are not stored.
        padding = self.random.randrange(3)
        plan = plan_tokens(
            self.window,
            torch.tensor([*starts, *[starts[-1]] * padding], dtype=torch.int32),
            torch.tensor(lens + [0] * padding, dtype=torch.int32),
            torch.tensor(prefilling + [False] * padding),
            self._table(rows + [Row(Tokens([]), 0, 0, [[], []], 0)] * padding, PAGE_GROUP, W),
            self._table(rows + [Row(Tokens([]), 0, 0, [[], []], 0)] * padding, LOCAL_GROUP, bs),
            torch.tensor([*np.concatenate(slots), *[-1] * padding], dtype=torch.int64),
        )
        self._store(plan)
        self._seal(plan, rows, context, lens, stamps, starts)
        self._attend(plan, context, lens, stamps, starts)

    def _store(self, plan: StepPlan) -> None:
        block, offset = plan.store_cells.block.numpy(), plan.store_cells.offset.numpy()
        expect((block > 0).all(), "the null block was written")
        cells = block * self.window.block_size + offset
        expect(len(set(cells.tolist())) == len(cells), "a cell was written twice in one step")
        self.local[block, offset] = self.now[plan.store.numpy()]
        self.page[block] = POISON

    def _cells(self, cells: Any) -> np.ndarray:
        block = cells.block.numpy()
        self.num_null_reads += int((block == 0).sum())
        return self.local[block, cells.offset.numpy()]

    def _seal(self, plan, rows, context, lens, stamps, starts) -> None:
        W = self.window.page_size
        expected = [
            (i, page)
            for i, (c, n) in enumerate(zip(context, lens, strict=True))
            for page in range(c // W, n // W)
        ]
        step = plan.seal
        if step is None:
            expect(not expected, "a completed page was not sealed")
            return
        ids = [rows[i].blocks[PAGE_GROUP][page] for i, page in expected]
        expect(step.page.tolist() == ids, "the wrong pages were sealed")
        expect(0 not in ids and len(set(ids)) == len(ids), "a page has no block of its own")
        in_flight = step.in_flight.numpy()
        old = self._cells(step.cells)
        for p, (i, page) in enumerate(expected):
            content = np.where(in_flight[p], self.now[step.token[p].numpy()], old[p])
            right = stamps[i][page * W : (page + 1) * W]
            expect((content == right).all(), f"page {page} was sealed from the wrong cells")
            pinned = self.window.sink_tokens if page == 0 else 0
            expect(int(step.num_pinned[p]) == pinned, "the wrong tokens were taken for sinks")
        self.local[ids] = POISON
        for (i, page), block in zip(expected, ids, strict=True):
            self.page[block] = stamps[i][page * W : (page + 1) * W]

    def _attend(self, plan, context, lens, stamps, starts) -> None:
        served = []
        if plan.decode is not None:
            d = plan.decode
            size = self.window.block_size
            offsets = torch.arange(size).repeat(d.block.shape[1]).expand(len(d.block), -1)
            raw = self._cells(Cells(d.block.repeat_interleave(size, 1), offsets))
            mask = d.raw_mask.numpy()
            pages, bounds = d.page.numpy(), d.page_start.tolist()
            expect(len(bounds) == len(d.query) + 1, "rows without pages of their own")
            expect((bounds[0], bounds[-1]) == (0, len(pages)), "pages that no row reads")
            for n, query in enumerate(d.query.tolist()):
                i = int(np.searchsorted(starts, query, side="right")) - 1
                served.append(i)
                own = pages[bounds[n] : bounds[n + 1]]
                self._check_read(
                    f"decode at {lens[i] - 1}",
                    stamps[i],
                    self.page[own].ravel(),
                    self.window.sink_tokens if len(own) else 0,
                    raw[n][mask[n]],
                )
        for p in plan.prefill:
            i = int(np.searchsorted(starts, p.start, side="right")) - 1
            served.append(i)
            expect((p.start, p.stop) == (starts[i], starts[i + 1]), "a chunk is not the request's")
            self._check_read(
                f"prefill from {context[i]}",
                stamps[i][: context[i]],
                self.page[p.page.numpy()].ravel(),
                p.num_skipped,
                self._cells(p.cells),
            )
        expect(sorted(served) == list(range(len(lens))), "not every request was attended once")

    def _check_read(
        self, what: str, right: np.ndarray, sealed: np.ndarray, skipped: int, raw: np.ndarray
    ) -> None:
        """Pages in order and raw cells must hold each token of `right` once."""
        expect(POISON not in raw, f"{what}: a raw cell was read that holds nothing")
        expect((sealed == right[: len(sealed)]).all(), f"{what}: a page is not this prefix's")
        read = np.concatenate([sealed[skipped:], raw])
        expect(len(read) == len(right), f"{what}: {len(read)} tokens read of {len(right)}")
        expect((np.sort(read) == np.sort(right)).all(), f"{what}: a raw cell holds another token")
