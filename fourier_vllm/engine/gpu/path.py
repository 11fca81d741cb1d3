"""Runs a step of one layer on a GPU: store, seal, attend, in this order over the batch.

Requests with one query token take Triton's kernels, whose grids and scratch follow from the number of
requests alone, so that a decode step is one CUDA graph. Prompts go through `prefill.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from vllm.utils.multi_stream_utils import maybe_execute_in_parallel
from vllm.utils.torch_utils import aux_stream

from fourier_vllm.engine.gpu.plan import GpuPlan, make_plan
from fourier_vllm.engine.gpu.prompt_attention import PromptAttention
from fourier_vllm.engine.gpu.prompts import Prefill
from fourier_vllm.engine.metadata import FourierMetadata, LayerStep
from fourier_vllm.kernels.gpu.decode import attend_pages
from fourier_vllm.kernels.gpu.decode_raw import attend_raw
from fourier_vllm.kernels.gpu.decode_raw import num_splits as num_raw_splits
from fourier_vllm.kernels.gpu.join import reduce, tile_of
from fourier_vllm.kernels.gpu.query_columns import query_columns
from fourier_vllm.kernels.gpu.seal import seal
from fourier_vllm.kernels.gpu.split import num_splits
from fourier_vllm.kernels.gpu.step import Batch, Tokens
from fourier_vllm.kernels.gpu.tables import Tables
from fourier_vllm.page import PageLayout
from fourier_vllm.window import Window

Work = Callable[[], None]


class GpuPath:
    """Kernels, tables and sizes of one layer.

    Parameters
    ----------
    dtype : torch.dtype
        Of the model.
    max_model_len, max_num_seqs, max_num_tokens : int
        Tokens of a request, and requests and tokens of a step, at most: what bounds grids and scratch.
    """

    def __init__(
        self,
        layout: PageLayout,
        window: Window,
        attention: PromptAttention,
        num_heads: int,
        scale: float,
        dtype: torch.dtype,
        device: torch.device,
        max_model_len: int,
        max_num_seqs: int,
        max_num_tokens: int,
    ) -> None:
        self.tables = Tables.build(layout, device)
        self.window, self.num_heads, self.scale, self.dtype = window, num_heads, scale, dtype
        self.max_pages = max_model_len // window.page_size
        self.max_num_seqs = max_num_seqs
        is_cuda = device.type == "cuda"
        self.side_stream = aux_stream() if is_cuda else None
        self.events = [torch.cuda.Event() if is_cuda else torch.Event(device) for _ in range(4)]
        self.prefill = Prefill(
            self.tables, window, attention, num_heads, dtype, max_model_len, max_num_tokens
        )

    def splits(self, batch: int) -> tuple[int, int]:
        """Parts of the pages and of the raw tokens."""
        H, sms = self.tables.layout.num_kv_heads, self.tables.num_sms
        return num_splits(batch, H, self.max_pages, sms), num_raw_splits(batch, H, sms)

    def scratch(self, batch: int) -> list[torch.Tensor]:
        """Partial outputs, their log-sum-exps and queries by column, from vLLM's workspace."""
        parts, heads = sum(self.splits(batch)), self.num_heads
        acc, lse, columns = self._workspace(batch * parts, batch)
        return [acc.view(batch, heads, parts, -1), lse.view(batch, heads, parts), columns]

    def _workspace(self, num_parts: int, batch: int) -> list[torch.Tensor]:
        from vllm.v1.worker.workspace import current_workspace_manager

        return current_workspace_manager().get_simultaneous(
            ((num_parts * self.num_heads, self.tables.layout.head_size), torch.float32),
            ((num_parts * self.num_heads,), torch.float32),
            ((batch, self.num_heads, self.tables.num_columns), torch.float16),
        )

    def prepare(self) -> None:
        """Ask for the most scratch that any step needs, while vLLM profiles memory, and compile."""
        # A larger batch may be split into fewer parts: each tensor at its own largest.
        parts = max(b * sum(self.splits(b)) for b in range(1, self.max_num_seqs + 1))
        self._workspace(parts, self.max_num_seqs)
        self.prefill.prepare()
        self._warm_up()

    def run(self, step: LayerStep) -> None:
        """One layer of one step."""
        plan, tokens = self.plan(step)
        store = partial(seal, self.tables, tokens, plan.slots)
        if plan.num_decodes:
            columns, sealed, raw, join = self.decode_work(plan, step)
            # Branches of a graph cost nothing; otherwise events would take the host longer than they save.
            is_graph = step.q.is_cuda and torch.cuda.is_current_stream_capturing()
            stream = self.side_stream if is_graph else None
            maybe_execute_in_parallel(store, columns, *self.events[:2], stream)
            maybe_execute_in_parallel(sealed, raw, *self.events[2:], stream)
            join()
        else:
            store()
        if plan.pieces:
            self.prefill.run(plan, tokens, step.q, step.output)

    def plan(self, step: LayerStep) -> tuple[GpuPlan, Tokens]:
        """What the step does, made by its first layer, and this layer's tokens."""
        pages, local, window = step.metadata, step.local_metadata, self.window
        plan = pages.once(
            local,
            window,
            lambda: make_plan(window, pages, local, step.k.shape[0], self.prefill.capacity),
        )
        tokens = Tokens(
            step.k,
            step.v,
            step.local,
            step.pages,
            local.block_table,
            pages.block_table,
            pages.seq_lens,
            pages.query_start_loc,
            window.sink_tokens,
        )
        return plan, tokens

    def decode_work(self, plan: GpuPlan, step: LayerStep) -> tuple[Work, Work, Work, Work]:
        """Queries laid out, attention over the pages, over raw tokens, and what joins them."""
        n, window = plan.num_decodes, self.window
        pages, table = step.metadata, step.local_metadata.block_table[:n]
        splits, raw_splits = self.splits(n)
        acc, lse, scratch = self.scratch(n)
        batch = Batch(
            step.q[:n],
            pages.query_start_loc,
            pages.block_table[:n],
            plan.num_pages[:n],
            self.scale,
            window.sink_tokens,
            seq_lens=pages.seq_lens[:n],
            gap_pages=plan.gap_pages,
            local_window=window.local_window,
        )

        def columns() -> None:
            query_columns(self.tables, batch.q, self.scale, scratch)

        def sealed() -> None:
            attend_pages(self.tables, batch, step.pages, acc, lse, splits, scratch)

        def raw() -> None:
            attend_raw(batch, step.local, table, window.page_size, acc, lse, splits, raw_splits)

        def join() -> None:
            reduce(self.tables, acc, lse, splits, step.output[:n], None)

        return columns, sealed, raw, join

    def _warm_up(self) -> None:
        """Compile what steps may need: requests that decode, few to many, and a prompt that goes on."""
        step = self._made_up_step()
        plan, tokens = self.plan(step)
        columns, sealed, raw, _ = self.decode_work(plan, step)

        def join(n: int) -> None:
            acc, lse, _ = self.scratch(n)
            out = step.output.new_empty(n, *step.output.shape[1:])
            reduce(self.tables, acc, lse, self.splits(n)[0], out, None)

        # Only joining depends on how many requests there are.
        heads, sms = self.num_heads, self.tables.num_sms
        batches = {tile_of(n * heads, sms): n for n in range(1, self.max_num_seqs + 1)}
        _side_by_side(
            step.q.device,
            partial(seal, self.tables, tokens, plan.slots),
            columns,
            sealed,
            raw,
            partial(self.prefill.run, plan, tokens, step.q, step.output),
            *(partial(join, n) for n in batches.values()),
        )

    def _made_up_step(self) -> LayerStep:
        """A request that decodes, and a prompt that goes on."""
        W, block, device = self.window.page_size, self.window.block_size, self.tables.basis.device
        layout = self.tables.layout
        H, D, T = layout.num_kv_heads, layout.head_size, 1 + W
        lens = torch.tensor([1, 2 * W], dtype=torch.int32)
        starts = torch.tensor([0, 1, T], dtype=torch.int32)

        def metadata(size: int) -> FourierMetadata:
            # Every block is the null block.
            blocks = max(self.max_pages, 2) * W // size
            return FourierMetadata(
                query_start_loc=starts.to(device),
                seq_lens=lens.to(device),
                is_prefilling=lens > 1,
                block_table=torch.zeros(2, blocks, dtype=torch.int32, device=device),
                slot_mapping=torch.full((T,), -1, dtype=torch.int64, device=device),
                query_start_loc_cpu=starts,
                seq_lens_cpu=lens,
            )

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=self.dtype, device=device)

        return LayerStep(
            q=zeros(T, self.num_heads, D),
            k=zeros(T, H, D),
            v=zeros(T, H, D),
            pages=torch.zeros(1, 1, 1, layout.page_bytes, dtype=torch.uint8, device=device),
            local=zeros(1, H, block, 2 * D),
            output=zeros(T, self.num_heads, D),
            metadata=metadata(W),
            local_metadata=metadata(block),
        )


def _side_by_side(device: torch.device, *work: Work) -> None:
    """Launch kernels that need nothing from each other: compiling them mostly leaves Python's lock alone."""
    if device.type != "cuda":  # Triton's interpreter has one state for all threads
        for do in work:
            do()
        return
    stream = torch.cuda.current_stream(device)

    def run(do: Work) -> None:
        with torch.inference_mode(), torch.cuda.stream(stream):
            do()

    with ThreadPoolExecutor(len(work)) as pool:
        list(pool.map(run, work))
