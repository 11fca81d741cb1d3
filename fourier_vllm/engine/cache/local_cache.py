"""The companion of a compressed layer: raw K and V of its recent and first tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_layout import KVCacheLayout

from fourier_vllm.engine.cache.specs import FourierLocalSpec
from fourier_vllm.engine.metadata import FourierMetadataBuilder

SUFFIX = ".fourier_local"


class FourierLocalBackend(AttentionBackend):
    """What both caches share: metadata and layout. The companion never runs attention itself."""

    @staticmethod
    def get_name() -> str:
        return "FOURIER_LOCAL"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("the companion cache has no attention of its own")

    @staticmethod
    def get_builder_cls() -> Any:
        return FourierMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(8)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Block-outermost: pages and raw blocks of different sizes side by side in one block id.
        return (KVCacheLayout.BLHNC,)


class FourierLocalCache(nn.Module, AttentionLayerBase):
    """A cache without an attention layer of its own, registered as `<layer>.fourier_local`.

    Attributes
    ----------
    kv_cache : torch.Tensor
        `[blocks, H, block_size, 2 * D]`, K then V; bound by vLLM, more than once.
    """

    def __init__(self, owner: Any, spec: FourierLocalSpec) -> None:
        super().__init__()
        self.spec = spec
        self.num_heads = owner.num_heads
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        return FourierLocalBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> FourierLocalSpec:
        return self.spec

    def forward(self) -> None:
        raise NotImplementedError("the owner reads and writes this cache")
