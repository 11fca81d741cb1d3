"""Where vLLM is touched: what the plugin relies on; a test fails when upstream moves."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap

import pytest
import torch
from vllm.config import AttentionConfig, CacheConfig, SchedulerConfig, VllmConfig
from vllm.device_allocator.sleep_mode_backend import CuMemBackend
from vllm.forward_context import ForwardContext
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import Platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig, get_attn_backend
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
    register_all_kvcache_specs,
)
from vllm.v1.engine.core import EngineCore
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request
from vllm.v1.worker.gpu_worker import Worker

from fourier_vllm.engine.backend import FourierBackend, FourierImpl
from fourier_vllm.engine.cache.local_cache import SUFFIX, FourierLocalCache
from fourier_vllm.engine.cache.managers import FourierLocalManager, FourierPageManager
from fourier_vllm.engine.cache.specs import FourierLocalSpec, FourierPageSpec
from fourier_vllm.engine.platform import SCAN_BREAKER, install
from fourier_vllm.window import Window
from tests.support.scheduling import local_spec, page_spec

WINDOW = Window(page_size=32, local_window=48, sink_tokens=16, block_size=16, exact_prefill=False)


def parameters(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def source(thing) -> str:
    return textwrap.dedent(inspect.getsource(thing))


def fields(thing) -> set[str]:
    return {field.name for field in dataclasses.fields(thing)}


# 1. The layer is found, and given its caches, after loading and before specs are collected.


def test_impl_is_made_by_position():
    expected = [
        "num_heads",
        "head_size",
        "scale",
        "num_kv_heads",
        "alibi_slopes",
        "sliding_window",
        "kv_cache_dtype",
        "logits_soft_cap",
        "attn_type",
        "kv_sharing_target_layer_name",
    ]
    call = next(
        node
        for node in ast.walk(ast.parse(source(Attention.__init__)))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "impl_cls"
    )
    assert [ast.unparse(arg) for arg in call.args] == expected, "order of the impl's arguments"
    assert parameters(FourierImpl.__init__)[: len(expected)] == expected


def test_layers_are_processed_after_loading():
    assert "impl.process_weights_after_loading(act_dtype)" in source(
        Attention.process_weights_after_loading
    ), "the layer no longer tells its impl that weights are loaded"
    assert parameters(AttentionImpl.process_weights_after_loading) == ["act_dtype"]


def test_layers_register_in_the_forward_context():
    text = source(Attention.__init__)
    assert "static_forward_context[prefix] = self" in text
    made, registered = text.index("impl_cls("), text.index("static_forward_context[prefix] = self")
    assert made < registered, "the impl is made before its layer has a name"
    assert "AttentionBackendEnum[self.attn_backend.get_name()]" in text, "names are enum members"
    assert "head_size_v" in text
    assert "kv_cache_torch_dtype" in source(Attention)


# 2. Companion layers.


def test_what_a_cache_layer_must_have():
    assert AttentionLayerBase.__abstractmethods__ == {"get_attn_backend", "get_kv_cache_spec"}
    assert not FourierLocalCache.__abstractmethods__
    assert parameters(AttentionLayerBase.get_kv_cache_spec) == ["vllm_config"]
    assert parameters(AttentionLayerBase.bind_kv_cache) == ["kv_cache"]


def test_the_name_of_the_companion_keeps_its_layer_index():
    assert extract_layer_index("model.layers.3.self_attn.attn" + SUFFIX) == 3


@pytest.mark.parametrize(
    "module", ["vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.attn_utils"], ids=["v1", "v2"]
)
def test_both_runners_ask_every_layer_object(module):
    text = source(pytest.importorskip(module))
    assert "attn_module.get_kv_cache_spec(" in text, "an instance's override would be passed by"
    assert "AttentionLayerBase" in text
    assert "customize_attention_spec(" in text


# 3. Specs and views.


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


# 4. The registry of specs.


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


# 5. Managers.

# Arguments that an override of ours names; more at the end are taken by **kwargs where it can.
MANAGER_METHODS = {
    "get_num_blocks_to_allocate": ["request_id", "num_tokens", "new_computed_blocks"],
    "allocate_new_blocks": ["request_id", "num_tokens", "num_tokens_main_model"],
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


# 6. The planner.


def test_memory_is_asked_of_specs():
    for method in ("max_memory_usage_bytes", "max_admission_blocks_per_request"):
        assert parameters(getattr(SlidingWindowSpec, method)) == parameters(
            getattr(FourierLocalSpec, method)
        ), method
    for name in ("max_concurrent_batches", "max_in_flight_tokens"):
        assert isinstance(getattr(VllmConfig, name), property), name
    assert "num_gpu_blocks" in fields(CacheConfig)


# 7. What a step brings.


def test_common_metadata():
    needed = {
        "query_start_loc",
        "seq_lens",
        "num_reqs",
        "is_prefilling",
        "block_table_tensor",
        "slot_mapping",
    }
    assert needed <= fields(CommonAttentionMetadata), needed - fields(CommonAttentionMetadata)
    assert parameters(AttentionMetadataBuilder.build)[:2] == [
        "common_prefix_len",
        "common_attn_metadata",
    ]
    assert parameters(AttentionMetadataBuilder.__init__) == [
        "kv_cache_spec",
        "layer_names",
        "vllm_config",
        "device",
    ]
    assert "dict[str" in str(ForwardContext.__annotations__["attn_metadata"])


def test_sleep_saves_buffers_and_restores_them_in_place():
    """Tables that are read by CUDA graphs are buffers of their layers."""
    assert "model.named_buffers()" in source(Worker.sleep)
    assert "buffer.data.copy_(self._sleep_saved_buffers[name].data)" in source(Worker.wake_up)
    assert '"runtime", "cudagraph"' in source(CuMemBackend.suspend), "what level 2 keeps"
    assert "clear_prefix_cache = level >= 1" in source(EngineCore.sleep)


# 8. Selection.


def test_backend_enum():
    assert hasattr(AttentionBackendEnum, "register"), "backends can no longer be added by name"
    assert parameters(AttentionBackendEnum.register) == ["name", "value"]
    for method in ("get_class", "get_path"):
        assert hasattr(AttentionBackendEnum, method)


def test_the_two_platform_hooks():
    for platform in (Platform, CpuPlatform):
        hook = inspect.getattr_static(platform, "check_and_update_config")
        assert isinstance(hook, classmethod)
        assert parameters(platform.check_and_update_config) == ["vllm_config"]
    names = ["selected_backend", "attn_selector_config"]
    assert parameters(Platform.get_attn_backend_cls)[:2] == names
    assert parameters(CpuPlatform.get_attn_backend_cls)[:2] == names


def test_a_refusal_finds_its_way():
    """`patches/engine_args.py` and `patches/engine_startup.py` stand on these."""
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.v1.engine import core, utils
    from vllm.v1.executor import multiproc_executor

    assert AsyncEngineArgs.create_engine_config is EngineArgs.create_engine_config
    assert "wait_for_engine_startup(" in source(utils.launch_core_engines)
    assert 'logger.exception("EngineCore failed to start.")' in source(core)
    assert 'logger.exception("WorkerProc failed to start.")' in source(multiproc_executor)


def test_a_checkpoint_chooses_the_dtype_of_the_cache():
    """Where vLLM makes another dtype of "auto": `kv_scheme.py` is before both."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.torch_utils import resolve_kv_cache_dtype_string

    assert parameters(resolve_kv_cache_dtype_string) == ["kv_cache_dtype", "model_config"]
    assert "resolve_kv_cache_dtype_string(" in source(EngineArgs.create_engine_config)
    rule = 'if kv_cache_scheme is not None and kv_cache_dtype == "auto":'
    assert rule in source(Attention.__init__)


def test_the_kernel_scan_still_needs_numba_hidden():
    """Where this fails, `platform._wrap_kernel_scan` can go."""
    import numba  # noqa: F401
    from vllm.triton_utils import dispatcher

    scan = dispatcher._rebind_kernels
    with pytest.raises(AttributeError, match="has no attribute 'get'"):
        scan([])
    install()
    CpuPlatform.register_triton_kernel_overrides()
    assert SCAN_BREAKER in sys.modules


def test_a_kind_of_layer_can_have_a_backend_of_its_own():
    assert "backend_per_kind" in fields(AttentionConfig)
    assert "backend_per_kind.get(kind.value, backend)" in source(get_attn_backend)


def test_selector_fields_are_validation_arguments():
    """The CPU wrapper passes one to the other."""
    accepted = set(parameters(AttentionBackend.validate_configuration))
    assert set(AttentionSelectorConfig._fields) <= accepted
    missing = accepted - set(AttentionSelectorConfig._fields)
    assert missing == {"device_capability"}


@pytest.mark.parametrize(
    "flag",
    [
        "supports_kv_connector",
        "supports_sink",
        "supports_mm_prefix",
        "supports_non_causal",
        "supports_dcp",
        "supports_pcp",
        "supports_rswa",
        "supports_batch_invariance",
        "is_mla",
        "is_sparse",
    ],
)
def test_what_the_backend_does_not_claim(flag):
    assert hasattr(AttentionBackend, flag), "a capability was renamed"
    assert not getattr(FourierBackend, flag)()


def test_kernel_block_sizes():
    (size,) = FourierBackend.get_supported_kernel_block_sizes()
    assert isinstance(size, MultipleOf), "a fixed size would widen the stride of blocks"


# 9, 10. Defaults.


def test_scheduler_gate_is_on_by_default():
    (gate,) = (f for f in dataclasses.fields(SchedulerConfig) if f.name.endswith("full_isl"))
    assert (gate.name, gate.default) == ("scheduler_reserve_full_isl", True)
    assert "disable_hybrid_kv_cache_manager" in fields(SchedulerConfig)


def test_imports_of_the_kernels():
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    names = ["output", "prefix_output", "prefix_lse", "suffix_output", "suffix_lse"]
    assert parameters(merge_attn_states)[:5] == names


def test_the_cpu_kernel_of_prompts():
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    assert parameters(_get_attn_isa)[:3] == ["dtype", "block_size", "head_size"]
    names = ["key", "value", "key_cache", "value_cache", "slot_mapping", "isa"]
    assert parameters(ops.cpu_attn_reshape_and_cache)[:6] == names


def test_prefilling_is_told_by_both_runners():
    for module in ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.attn_utils"):
        assert "is_prefilling" in source(pytest.importorskip(module)), module
    runner = source(pytest.importorskip("vllm.v1.worker.gpu_model_runner"))
    assert "num_computed_tokens_cpu < num_prompt_tokens_cpu" in runner


def test_the_engine_core_reports_capacity_before_caches_are_allocated():
    """Where `engine/patches/kv_cache_capacity.py` is called back."""
    from vllm.v1.engine import core

    assert parameters(core.update_kv_cache_capacity) == ["vllm_config", "kv_cache_config"]
    body = source(core.EngineCore._initialize_kv_caches)
    call = body.index("update_kv_cache_capacity(vllm_config, scheduler_kv_cache_config)")
    assert call < body.index("self.model_executor.initialize_from_config(")
