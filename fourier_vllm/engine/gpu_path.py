"""Runs a step of one layer on a GPU: store, seal, attend, in this order over the batch.

Requests with one query token take Triton's kernels, whose grids and scratch follow from the number of
requests alone, so that a decode step is one CUDA graph. Prompts go through `prefill.py`.
"""

from __future__ import annotations

import torch

from fourier_vllm.engine.gpu_plan import GpuPlan, make_plan
from fourier_vllm.engine.metadata import FourierMetadata
from fourier_vllm.engine.plan import Window
from fourier_vllm.engine.prefill import Prefill
from fourier_vllm.kernels.decode import attend_pages
from fourier_vllm.kernels.decode_raw import attend_raw
from fourier_vllm.kernels.decode_raw import num_splits as num_raw_splits
from fourier_vllm.kernels.reduce import reduce
from fourier_vllm.kernels.reference import PageCodec
from fourier_vllm.kernels.seal import seal
from fourier_vllm.kernels.split import num_splits
from fourier_vllm.kernels.store import store
from fourier_vllm.kernels.tables import Tables


class GpuPath:
    """Kernels, tables and sizes of one layer.

    Parameters
    ----------
    max_model_len, max_num_seqs : int
        What bounds the grids and the scratch of a decode step.
    """

    def __init__(
        self,
        codec: PageCodec,
        window: Window,
        num_heads: int,
        scale: float,
        device: torch.device,
        max_model_len: int,
        max_num_seqs: int,
    ) -> None:
        self.tables = Tables.build(codec.layout, device)
        self.window, self.num_heads, self.scale = window, num_heads, scale
        self.max_pages = max_model_len // window.page_size
        self.max_num_seqs = max_num_seqs
        self.prefill = Prefill(codec, scale)

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

    def reserve(self) -> None:
        """Ask for the most scratch that any step needs, while vLLM profiles memory."""
        # A larger batch may be split into fewer parts: each tensor at its own largest.
        parts = max(b * sum(self.splits(b)) for b in range(1, self.max_num_seqs + 1))
        self._workspace(parts, self.max_num_seqs)

    def run(
        self,
        metadata: FourierMetadata,
        local_metadata: FourierMetadata,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pages: torch.Tensor,
        local: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """One layer of one step; tensors as in `reference_path.run_step`."""
        plan = metadata.once(
            local_metadata,
            self.window,
            lambda: make_plan(self.window, metadata, local_metadata, self.prefill.has_flash),
        )
        store(k, v, local, local_metadata.slot_mapping[: len(k)])
        seal(
            self.tables,
            k,
            v,
            local,
            local_metadata.block_table,
            pages,
            metadata.block_table,
            metadata.seq_lens,
            metadata.query_start_loc,
            self.window.sink_tokens,
        )
        if plan.num_decodes:
            self._decode(plan, metadata, local_metadata, q, pages, local, output)
        if plan.max_prefill:
            self.prefill.run(plan, metadata, local_metadata, q, k, v, pages, local, output)

    def _decode(
        self,
        plan: GpuPlan,
        metadata: FourierMetadata,
        local_metadata: FourierMetadata,
        q: torch.Tensor,
        pages: torch.Tensor,
        local: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        n, window = plan.num_decodes, self.window
        q = q[:n]
        splits, raw_splits = self.splits(n)
        acc, lse, columns = self.scratch(n)
        starts, seq_lens = metadata.query_start_loc[: n + 1], metadata.seq_lens[:n]
        attend_pages(
            self.tables, q, pages, metadata.block_table[:n], plan.num_pages, starts, 1, self.scale,
            window.sink_tokens, acc, lse, splits, columns, seq_lens, plan.gap_pages,
            window.local_window,
        )  # fmt: skip
        attend_raw(
            q, local, local_metadata.block_table[:n], plan.num_pages, plan.gap_pages, seq_lens,
            starts, 1, self.scale, window.sink_tokens, window.local_window, window.page_size, acc,
            lse, splits, raw_splits,
        )  # fmt: skip
        reduce(self.tables, acc, lse, splits, output[:n], None)
