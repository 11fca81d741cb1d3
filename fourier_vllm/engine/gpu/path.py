"""Runs a step of one layer on a GPU: store, seal, attend, in this order over the batch.

Requests with one query token take Triton's kernels, whose grids and scratch follow from the number of
requests alone, so that a decode step is one CUDA graph. Prompts go through `prompts.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import torch
from vllm.utils.multi_stream_utils import maybe_execute_in_parallel
from vllm.utils.torch_utils import aux_stream

from fourier_vllm.engine.gpu.plan import GpuPlan, plan_step
from fourier_vllm.engine.gpu.prompt_attention import PromptAttention
from fourier_vllm.engine.gpu.prompts import Prefill
from fourier_vllm.engine.metadata import FourierMetadata
from fourier_vllm.kernels.gpu.decode import attend_pages
from fourier_vllm.kernels.gpu.decode_raw import attend_raw, parts_of_raw
from fourier_vllm.kernels.gpu.join import join_parts, tile_of
from fourier_vllm.kernels.gpu.launch import Launches
from fourier_vllm.kernels.gpu.query_columns import query_columns
from fourier_vllm.kernels.gpu.seal import seal
from fourier_vllm.kernels.gpu.split import parts_of_pages
from fourier_vllm.kernels.gpu.step import Layer, Parts
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
        self.tables, self.seals = Tables.build(layout, device), Launches()
        self.window, self.num_heads, self.scale, self.dtype = window, num_heads, scale, dtype
        self.max_pages = max_model_len // window.page_size
        self.max_num_seqs = max_num_seqs
        is_cuda = device.type == "cuda"
        self.side_stream = aux_stream() if is_cuda else None
        self.events = [torch.cuda.Event() if is_cuda else torch.Event(device) for _ in range(4)]
        self.prefill = Prefill(
            self.tables, window, attention, num_heads, dtype, max_model_len, max_num_tokens
        )

    def parts(self, num_requests: int) -> Parts:
        """Scratch for requests that decode, from vLLM's workspace."""
        of_pages, of_raw = self._num_parts(num_requests)
        n, heads = of_pages + of_raw, self.num_heads
        acc, lse, columns = self._workspace(num_requests * n, num_requests)
        shape = (num_requests, heads, n)
        return Parts(acc.view(*shape, -1), lse.view(shape), columns, of_pages, of_raw)

    def _num_parts(self, num_requests: int) -> tuple[int, int]:
        """Parts of the pages and of the raw tokens."""
        H, sms = self.tables.layout.num_kv_heads, self.tables.num_sms
        of_pages = parts_of_pages(num_requests, H, self.max_pages, sms)
        return of_pages, parts_of_raw(num_requests, H, sms)

    def _workspace(self, num_parts: int, num_requests: int) -> list[torch.Tensor]:
        from vllm.v1.worker.workspace import current_workspace_manager

        return current_workspace_manager().get_simultaneous(
            ((num_parts * self.num_heads, self.tables.layout.head_size), torch.float32),
            ((num_parts * self.num_heads,), torch.float32),
            ((num_requests, self.num_heads, self.tables.num_columns), torch.float16),
        )

    def prepare(self) -> None:
        """Ask for the most scratch that any step needs, while vLLM profiles memory, and compile."""
        # More requests may be split into fewer parts: each tensor at its own largest.
        parts = max(n * sum(self._num_parts(n)) for n in range(1, self.max_num_seqs + 1))
        self._workspace(parts, self.max_num_seqs)
        self.prefill.prepare()
        self._warm_up()

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        pages: torch.Tensor,
        local: torch.Tensor,
        metadata: FourierMetadata,
        local_metadata: FourierMetadata,
    ) -> None:
        """One layer of one step."""
        plan = local_metadata.plan
        if plan is None:
            plan = local_metadata.plan = self.plan(metadata, local_metadata, k.shape[0])
        layer = Layer(self.tables, self.seals, self.scale, pages, local)
        n = plan.num_decodes
        if n:
            self._decode(layer, plan, q[:n], k, v, out[:n])
        else:
            seal(layer, plan.step, k, v)
        if plan.pieces:
            self.prefill.run(layer, plan, q, k, v, out)

    def plan(
        self, metadata: FourierMetadata, local_metadata: FourierMetadata, num_tokens: int
    ) -> GpuPlan:
        """Plan a step of `num_tokens`, padding included."""
        return plan_step(self.window, metadata, local_metadata, num_tokens, self.prefill.capacity)

    def _decode(
        self,
        layer: Layer,
        plan: GpuPlan,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Seal tokens `k, v [T, H, D]` of all requests; attend `q, out [N, Hq, D]` of those that decode."""
        parts, decodes = self.parts(plan.num_decodes), plan.decodes
        # Branches of a graph cost nothing; otherwise events would take the host longer than they save.
        is_graph = q.is_cuda and torch.cuda.is_current_stream_capturing()
        stream = self.side_stream if is_graph else None
        maybe_execute_in_parallel(
            lambda: seal(layer, plan.step, k, v),
            lambda: query_columns(layer, q, parts),
            *self.events[:2],
            stream,
        )
        maybe_execute_in_parallel(
            lambda: attend_pages(layer, decodes, q, parts),
            lambda: attend_raw(layer, decodes, q, parts),
            *self.events[2:],
            stream,
        )
        join_parts(self.tables, parts, out)

    def _warm_up(self) -> None:
        """Compile what steps may need: requests that decode, few to many, and a prompt that goes on."""
        layout, device, T = self.tables.layout, self.tables.basis.device, 1 + self.window.page_size
        H, D, heads, sms = (
            layout.num_kv_heads,
            layout.head_size,
            self.num_heads,
            self.tables.num_sms,
        )

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=self.dtype, device=device)

        q, k, v, out = zeros(T, heads, D), zeros(T, H, D), zeros(T, H, D), zeros(T, heads, D)
        pages = torch.zeros(1, 1, 1, layout.page_bytes, dtype=torch.uint8, device=device)
        local = zeros(1, H, self.window.block_size, 2 * D)
        layer = Layer(self.tables, self.seals, self.scale, pages, local)
        plan = self.plan(*self._made_up_metadata(), T)
        q_n, parts = q[: plan.num_decodes], self.parts(plan.num_decodes)

        def join(n: int) -> None:
            join_parts(self.tables, self.parts(n), out.new_empty(n, heads, D))

        # Only joining depends on how many requests there are.
        counts = {tile_of(n * heads, sms): n for n in range(1, self.max_num_seqs + 1)}
        _side_by_side(
            device,
            partial(seal, layer, plan.step, k, v),
            partial(query_columns, layer, q_n, parts),
            partial(attend_pages, layer, plan.decodes, q_n, parts),
            partial(attend_raw, layer, plan.decodes, q_n, parts),
            partial(self.prefill.run, layer, plan, q, k, v, out),
            *(partial(join, n) for n in counts.values()),
        )

    def _made_up_metadata(self) -> tuple[FourierMetadata, FourierMetadata]:
        """A request that decodes, and a prompt that goes on."""
        W, device = self.window.page_size, self.tables.basis.device
        lens = torch.tensor([1, 2 * W], dtype=torch.int32)
        starts = torch.tensor([0, 1, 1 + W], dtype=torch.int32)

        def metadata(size: int) -> FourierMetadata:
            # Every block is the null block.
            blocks = max(self.max_pages, 2) * W // size
            common = SimpleNamespace(
                num_reqs=2,
                query_start_loc=starts.to(device),
                query_start_loc_cpu=starts,
                seq_lens=lens.to(device),
                seq_lens_cpu_upper_bound=lens,
                is_prefilling=lens > 1,
                block_table_tensor=torch.zeros(2, blocks, dtype=torch.int32, device=device),
                slot_mapping=torch.full((1 + W,), -1, dtype=torch.int64, device=device),
            )
            return FourierMetadata(common)

        return metadata(W), metadata(self.window.block_size)


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
