"""What the two caches take for granted of vLLM's specs, managers and scheduler."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from vllm.config import CacheConfig, SchedulerConfig, VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
)
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
    register_all_kvcache_specs,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from fourier_vllm.engine.backend import FourierBackend
from fourier_vllm.engine.cache.managers import FourierLocalManager, FourierPageManager
from fourier_vllm.engine.cache.specs import FourierLocalSpec, FourierPageSpec
from fourier_vllm.window import Window
from tests.support.scheduling import local_spec, page_spec
from tests.support.upstream import fields, parameters, source

WINDOW = Window(page_size=32, local_window=48, sink_tokens=16, block_size=16, exact_prefill=False)


def test_spec_fields():
    needed = {
        "block_size",
        "num_kv_heads",
        "head_size",
        "dtype",
        "num_head_slots",
        "tokens_per_state",
        "state_content_bytes",
        "block_stride_alignment",
        "page_size_padded",
    }
    assert needed <= fields(AttentionSpec), needed - fields(AttentionSpec)
    assert "sliding_window" in fields(SlidingWindowSpec)
    for spec in (FourierPageSpec, FourierLocalSpec):
        assert spec.__dataclass_params__.frozen


def test_a_page_is_one_record():
    page, local = page_spec(WINDOW, 2048), local_spec(WINDOW)
    assert page.page_size_bytes == 2048
    assert local.page_size_bytes == 2 * 16 * 2 * 32 * 2
    assert not isinstance(page, SlidingWindowSpec)
    assert isinstance(page, FullAttentionSpec)
    # Mixed precision would have every new block zeroed.
    assert page.dtype == local.dtype
    assert page.kv_quant_mode == local.kv_quant_mode


def test_specs_of_unlike_layers_do_not_merge():
    with pytest.raises(AssertionError):
        FourierPageSpec.merge([page_spec(WINDOW, 2048), page_spec(WINDOW, 4096)])
    assert FourierPageSpec.merge([page_spec(WINDOW)] * 3) == page_spec(WINDOW)


def test_the_layout_that_packs_mixed_sizes():
    assert KVCacheLayout.BLHNC.is_block_outermost
    assert KVCacheLayout.BLHNC.stride_order == (1, 0, 2, 3, 4)
    assert FourierBackend.supported_kv_cache_layouts() == (KVCacheLayout.BLHNC,)
    assert hasattr(AttentionBackend, "supported_kv_cache_layouts")


def test_registering_keeps_the_built_in_specs():
    text = source(KVCacheSpecRegistry._ensure_registered)
    assert "if _REGISTRY_KVCACHESPEC_LIST:\n        return" in text, "the trap has gone or moved"
    assert parameters(register_all_kvcache_specs) == ["vllm_config"]
    names = ["kvcache_spec_cls", "manager_class", "uniform_type_base_spec"]
    assert parameters(KVCacheSpecRegistry.register) == names
    for spec, manager in (
        (page_spec(WINDOW), FourierPageManager),
        (local_spec(WINDOW), FourierLocalManager),
    ):
        assert KVCacheSpecRegistry.get_manager_class(spec) is manager
    stock = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.bfloat16)
    assert KVCacheSpecRegistry.get_manager_class(stock) is FullAttentionManager


def test_pages_and_local_blocks_are_grouped_apart():
    uniform = KVCacheSpecRegistry.get_uniform_type_base_spec
    assert uniform(page_spec(WINDOW)) is FullAttentionSpec
    assert uniform(local_spec(WINDOW)) is FourierLocalSpec, "not with the model's own windows"


# Arguments that an override of ours names; more at the end are taken by **kwargs where it can.
MANAGER_METHODS = {
    "get_num_blocks_to_allocate": ["request_id", "num_tokens", "new_computed_blocks"],
    "allocate_new_blocks": ["request_id", "num_tokens", "num_tokens_main_model"],
    "allocate_external_computed_blocks": [
        "request_id",
        "num_local_computed_tokens",
        "num_external_computed_tokens",
        "record_for_zeroing",
    ],
    "remove_skipped_blocks": ["request_id", "processed_computed_tokens", "num_prompt_tokens"],
    "pop_blocks_for_free": ["request_id"],
    "cache_blocks": ["request", "num_tokens"],
    "get_num_skipped_tokens": ["num_computed_tokens"],
    "find_longest_cache_hit": [
        "block_hashes",
        "max_length",
        "kv_cache_group_ids",
        "block_pool",
        "kv_cache_spec",
        "drop_eagle_block",
        "alignment_tokens",
        "dcp_world_size",
        "pcp_world_size",
    ],
}


@pytest.mark.parametrize("name", MANAGER_METHODS)
def test_manager_signatures(name):
    upstream = parameters(getattr(SlidingWindowManager, name))
    expected = MANAGER_METHODS[name]
    assert upstream[: len(expected)] == expected
    ours = inspect.signature(getattr(FourierLocalManager, name)).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in ours.values()):
        assert upstream == [n for n in ours if n != "self"], "an argument was added"


def test_what_managers_are_built_on():
    base = SingleTypeKVCacheManager
    assert "apply_admission_cap" in parameters(base.get_num_blocks_to_allocate)
    assert "max_admission_blocks_per_request" in parameters(base.__init__)
    for name in ("_get_num_evictable_blocks", "reachable_block_mask", "free"):
        assert hasattr(base, name), name
    text = source(base.__init__)
    for name in ("self._null_block", "self.req_to_blocks", "self.block_pool", "self.block_size"):
        assert name in text, name
    assert hasattr(FullAttentionManager, "_cache_partial_tail_block")
    assert FullAttentionManager.supports_fine_grained_hash_lookup
    for name in ("get_new_blocks", "free_blocks", "get_cached_block", "touch"):
        assert hasattr(BlockPool, name), name
    assert parameters(BlockPool.free_blocks) == ["ordered_blocks"]


def test_the_tier_is_asked_for_what_follows_a_local_hit():
    """`lookup_behind` tells the managers how much that is."""
    from vllm.distributed.kv_transfer.kv_connector.v1.simple_cpu_offload_connector import (
        SimpleCPUOffloadConnector,
    )
    from vllm.v1.simple_kv_offload.manager import SimpleCPUOffloadScheduler

    for asked in (SimpleCPUOffloadConnector, SimpleCPUOffloadScheduler):
        found = parameters(asked.get_num_new_matched_tokens)
        assert found == ["request", "num_computed_tokens"]
    text = source(SimpleCPUOffloadScheduler.get_num_new_matched_tokens)
    assert "request.block_hashes[num_skipped_hashes:]" in text
    assert "self.cpu_coordinator.find_longest_cache_hit(" in text


def test_order_inside_allocate_slots():
    """Gate, free, count, take, publish: the managers count on it."""
    text = source(KVCacheManager.allocate_slots)
    steps = [
        "if full_sequence_must_fit:",
        "apply_admission_cap=True",
        "self.coordinator.remove_skipped_blocks(",
        "total_computed_tokens - request.num_in_flight_tokens",
        "self.coordinator.allocate_new_computed_blocks(",
        "self.coordinator.allocate_new_blocks(",
        "self.coordinator.cache_blocks(",
    ]
    places = [text.index(step) for step in steps]
    assert places == sorted(places), "the order has changed"
    assert "num_prompt_tokens=request.num_prompt_tokens" in text
    assert "num_in_flight_tokens" in source(Request.__init__)


def test_memory_is_asked_of_specs():
    for method in ("max_memory_usage_bytes", "max_admission_blocks_per_request"):
        assert parameters(getattr(SlidingWindowSpec, method)) == parameters(
            getattr(FourierLocalSpec, method)
        ), method
    for name in ("max_concurrent_batches", "max_in_flight_tokens"):
        assert isinstance(getattr(VllmConfig, name), property), name
    assert "num_gpu_blocks" in fields(CacheConfig)


def test_scheduler_gate_is_on_by_default():
    (gate,) = (f for f in dataclasses.fields(SchedulerConfig) if f.name.endswith("full_isl"))
    assert (gate.name, gate.default) == ("scheduler_reserve_full_isl", True)
    assert "disable_hybrid_kv_cache_manager" in fields(SchedulerConfig)


def test_the_engine_core_reports_capacity_before_caches_are_allocated():
    """Where `engine/patches/kv_cache_capacity.py` is called back."""
    from vllm.v1.engine import core

    assert parameters(core.update_kv_cache_capacity) == ["vllm_config", "kv_cache_config"]
    body = source(core.EngineCore._initialize_kv_caches)
    call = body.index("update_kv_cache_capacity(vllm_config, scheduler_kv_cache_config)")
    assert call < body.index("self.model_executor.initialize_from_config(")
