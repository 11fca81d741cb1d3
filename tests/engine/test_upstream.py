"""Where vLLM is touched: what the plugin relies on; a test fails when upstream moves."""

from __future__ import annotations

import ast
import inspect
import sys

import pytest
from vllm.config import AttentionConfig
from vllm.device_allocator.sleep_mode_backend import CuMemBackend
from vllm.forward_context import ForwardContext, set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
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
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker.gpu_worker import Worker

from fourier_vllm.engine.backend import FourierBackend, FourierImpl
from fourier_vllm.engine.cache.local_cache import SUFFIX, FourierLocalCache
from fourier_vllm.engine.platform import SCAN_BREAKER, install
from tests.support.upstream import fields, parameters, source


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


def test_what_measuring_the_model_relies_on():
    """`engine/measure` takes the place of attention layers, and runs the model as the runner does."""
    expected = ["query", "key", "value", "output_shape", "output_dtype"]
    assert parameters(Attention.forward) == expected
    text = source(Attention.__init__)
    for name in ("num_heads", "num_kv_heads", "head_size", "sliding_window"):
        assert f"self.{name} = " in text, name
    assert "skip_compiled" in parameters(set_forward_context)
    loading = source(process_weights_after_loading)
    weights, attention = (
        loading.index("quant_method.process_weights_after_loading(module)"),
        loading.index("is_deferred_attention_layer(module)"),
    )
    assert weights < attention, "attention is told last, when all weights can be used"
    for kind in (LlamaForCausalLM, Gemma3ForCausalLM):
        assert {"input_ids", "positions", "intermediate_tensors", "inputs_embeds"} <= set(
            parameters(kind.forward)
        )
        assert "hidden_states" in parameters(kind.compute_logits)
