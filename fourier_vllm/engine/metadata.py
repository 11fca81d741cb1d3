"""Attention metadata of both caches: views of vLLM's common fields, and the plan of the step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
)


@dataclass
class FourierMetadata(AttentionMetadata):
    """One cache group's view of a step; N requests, T tokens. Each builder makes one; views are made late.

    Attributes
    ----------
    common : CommonAttentionMetadata
        vLLM's, of the group; rows from its `num_reqs` on are padding.
    plan : GpuPlan or StepPlan, optional
        What the step does, made by the first layer that runs; on the local cache's metadata. Layers that
        share it share the pages' table too, since vLLM plans the pages of all layers as one group.
    """

    common: Any
    plan: Any = None

    @cached_property
    def query_start_loc(self) -> torch.Tensor:
        """`[N + 1]`, where each request's tokens of this step begin."""
        return self.common.query_start_loc[: self.common.num_reqs + 1]

    @cached_property
    def query_start_loc_cpu(self) -> torch.Tensor:
        """`[N + 1]`, what the host knows of it."""
        return self.common.query_start_loc_cpu[: self.common.num_reqs + 1]

    @cached_property
    def seq_lens(self) -> torch.Tensor:
        """`[N]`, this step's tokens included."""
        return self.common.seq_lens[: self.common.num_reqs]

    @cached_property
    def seq_lens_cpu(self) -> torch.Tensor | None:
        """`[N]`, exact for requests that are prefilled."""
        known = self.common.seq_lens_cpu_upper_bound
        return None if known is None else known[: self.common.num_reqs]

    @cached_property
    def is_prefilling(self) -> torch.Tensor:
        """`[N]` bool, on the host."""
        known, n = self.common.is_prefilling, self.common.num_reqs
        return torch.zeros(n, dtype=torch.bool) if known is None else known[:n]

    @cached_property
    def block_table(self) -> torch.Tensor:
        """`[N, blocks]`, of this group."""
        return self.common.block_table_tensor[: self.common.num_reqs]

    @property
    def slot_mapping(self) -> torch.Tensor:
        """`[T]`, of this group."""
        return self.common.slot_mapping


class FourierMetadataBuilder(AttentionMetadataBuilder[FourierMetadata]):
    """Keeps a reference to the runner's tensors; nothing is computed before a layer runs."""

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
        return FourierMetadata(common_attn_metadata)
