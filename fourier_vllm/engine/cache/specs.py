"""KV cache specs of the two caches of a compressed layer, registered when this module is imported.

Specs travel from workers to the engine core by pickle and must be equal on all tensor-parallel ranks,
so they hold sizes only, never which dim is stored how.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from fourier_vllm.engine.patches import kv_cache_capacity


def _only(specs: list[Any]) -> Any:
    assert all(spec == specs[0] for spec in specs[1:]), "layers of one group must be alike"
    return specs[0]


@dataclass(frozen=True, kw_only=True)
class FourierPageSpec(FullAttentionSpec):
    """Sealed pages: one opaque record for `block_size` tokens of all KV heads of the rank."""

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        return _only(specs)


@dataclass(frozen=True, kw_only=True)
class FourierLocalSpec(SlidingWindowSpec):
    """Raw K and V of recent tokens, vLLM's ordinary cell layout.

    `sliding_window` is at least the local window plus one page: a query reads at most that many raw tokens,
    and a page is still whole when it is sealed. No other layer of the model has the same, or vLLM would
    plan both as one group, under the manager of the first layer.
    """

    page_size: int
    local_window: int
    num_pinned_blocks: int
    exact_prefill: bool
    num_groups: int = 1  # cache groups that vLLM splits the raw caches of all layers into

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        return _only(specs)

    @property
    def num_retained_tokens(self) -> int:
        """vLLM 0.33's runner nulls table entries below this many tokens, pinned ones too; 0 is never."""
        return 0

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        """Layers that vLLM may put into one group with this one: its like, no other sliding window."""
        return all(
            isinstance(spec, FourierLocalSpec) and spec.sliding_window == self.sliding_window
            for spec in kv_cache_specs.values()
        )

    def steady_blocks(self, max_model_len: int, num_batches: int) -> int:
        """Blocks a decoding request holds, with `num_batches` steps in flight."""
        tokens = self.sliding_window - 1 + num_batches
        window = cdiv(tokens - 1, self.block_size) + 1
        return min(self.num_pinned_blocks + window, cdiv(max_model_len, self.block_size))

    def peak_blocks(self, max_model_len: int, num_batches: int, max_chunk: int) -> int:
        """Blocks a request holds at most, while it is prefilled in chunks of up to `max_chunk`."""
        whole = cdiv(max_model_len, self.block_size)
        if self.exact_prefill:
            return whole
        # The tails of the chunks in flight stand beside the window of the tokens before them.
        tail = cdiv(min(max_chunk, self.sliding_window - 1), self.block_size) + 1
        return min(self.steady_blocks(max_model_len, num_batches) + num_batches * tail, whole)

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        # A chunk is at most all tokens in flight; one batch of them is the bound over any split.
        return self.peak_blocks(max_model_len, 1, max_in_flight_tokens)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes a request at the maximum length is charged in this cache.

        Before the pool is sized this is the peak of one request, so that vLLM's start-up check is right.
        Afterwards vLLM divides the pool by it to report capacity: then it is the steady size plus this
        request's share of the one prefill peak the engine must keep room for, which makes the reported
        number the number of requests that really run at once.
        """
        length = vllm_config.model_config.max_model_len
        batches = vllm_config.max_concurrent_batches
        chunk = vllm_config.scheduler_config.max_num_batched_tokens
        peak = self.peak_blocks(length, batches, chunk)
        pool = vllm_config.cache_config.num_gpu_blocks
        if not pool:
            return peak * self.page_size_bytes
        steady = self.steady_blocks(length, batches)
        pages = cdiv(length, self.page_size)
        usable = pool - 1 - self.num_groups * (peak - steady)  # one is vLLM's null block
        concurrency = max(usable / (pages + self.num_groups * steady), 1.0)
        charged = max(math.ceil((pool / concurrency - pages) / self.num_groups), steady)
        return charged * self.page_size_bytes


def _register() -> None:
    from fourier_vllm.engine.cache.managers import FourierLocalManager, FourierPageManager

    # Registering ours into an empty registry would keep vLLM from adding its own.
    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(FourierPageSpec, FourierPageManager, FullAttentionSpec)
    KVCacheSpecRegistry.register(FourierLocalSpec, FourierLocalManager, FourierLocalSpec)
    kv_cache_capacity.install()


_register()
