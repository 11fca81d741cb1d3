"""Attention metadata of both caches: vLLM's common fields, and the plan of the step made from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
)

from fourier_vllm.engine.cpu.plan import StepPlan, make_plan
from fourier_vllm.window import Window

MADE = "_fourier_metadata"
Plan = TypeVar("Plan")


@dataclass
class FourierMetadata(AttentionMetadata):
    """One group's view of a step; N requests, T tokens.

    Attributes
    ----------
    query_start_loc, seq_lens : torch.Tensor
        `[N + 1]`, `[N]` (this step's tokens included).
    block_table, slot_mapping : torch.Tensor
        `[N, blocks]`, `[T]`, of this group.
    query_start_loc_cpu, seq_lens_cpu, is_prefilling : torch.Tensor
        What the host knows: `[N + 1]`; `[N]`, exact for requests that are prefilled; `[N]` bool.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    is_prefilling: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens_cpu: torch.Tensor | None
    _plans: dict[Any, Any] = field(default_factory=dict)

    def once(self, local: FourierMetadata, window: Window, make: Callable[[], Plan]) -> Plan:
        """The step's plan, made by the first layer that asks; `self` is the page cache's metadata."""
        key = (id(local), window)
        if key not in self._plans:
            self._plans[key] = make()
        return cast("Plan", self._plans[key])

    def plan(self, local: FourierMetadata, window: Window) -> StepPlan:
        """The plan of the reference path."""
        return self.once(
            local,
            window,
            lambda: make_plan(
                window,
                self.query_start_loc,
                self.seq_lens,
                self.is_prefilling.to(self.seq_lens.device),
                self.block_table,
                local.block_table,
                local.slot_mapping,
            ),
        )


class LayerStep(NamedTuple):
    """Tensors of one layer in one step.

    Attributes
    ----------
    q, output : torch.Tensor
        `[T, Hq, D]`.
    k, v : torch.Tensor
        `[T, H, D]`.
    pages : torch.Tensor
        `[blocks, 1, 1, page_bytes]` uint8, the page cache.
    local : torch.Tensor
        `[blocks, H, block_size, 2 * D]`, the local cache.
    metadata, local_metadata : FourierMetadata
        Of the two caches.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    pages: torch.Tensor
    local: torch.Tensor
    output: torch.Tensor
    metadata: FourierMetadata
    local_metadata: FourierMetadata


class FourierMetadataBuilder(AttentionMetadataBuilder[FourierMetadata]):
    """Keeps references to the runner's tensors; nothing is computed before a layer runs."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    )

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        # The GPU path takes requests with one query token first.
        self.reorder_batch_threshold = 1 if device.type == "cuda" else None

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> FourierMetadata:
        common = common_attn_metadata
        # Layers of one group with pages of different sizes have builders of their own.
        made: FourierMetadata | None = getattr(common, MADE, None)
        if made is not None:
            return made
        N = common.num_reqs
        is_prefilling = common.is_prefilling
        if is_prefilling is None:
            is_prefilling = torch.zeros(N, dtype=torch.bool)
        seq_lens_cpu = common.seq_lens_cpu_upper_bound
        made = FourierMetadata(
            query_start_loc=common.query_start_loc[: N + 1],
            seq_lens=common.seq_lens[:N],
            is_prefilling=is_prefilling[:N],
            block_table=common.block_table_tensor[:N],
            slot_mapping=common.slot_mapping,
            query_start_loc_cpu=common.query_start_loc_cpu[: N + 1],
            seq_lens_cpu=None if seq_lens_cpu is None else seq_lens_cpu[:N],
        )
        setattr(common, MADE, made)
        return made
