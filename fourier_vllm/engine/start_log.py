"""The lines at start-up: what the plugin does to this engine's memory, and how to get a better recipe."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger

from fourier_vllm.recipe import PREDICTED_TARGET, TARGETS

# Below the `vllm` logger, so that vLLM's logging options apply.
logger = init_logger("vllm.fourier_vllm")

WORTH_IT = 1.2  # times stock's tokens, below which the gain is within what the quality costs


def log_capacity(vllm_config: Any, kv_cache_config: Any) -> None:
    """Log recipe, source, bytes a token, and the tokens that the cache holds beside what stock's would.

    Parameters
    ----------
    kv_cache_config : vllm.v1.kv_cache_interface.KVCacheConfig
        As planned, after vLLM has put the capacity into the engine's configuration.
    """
    from fourier_vllm.engine.cache.specs import FourierLocalSpec, FourierPageSpec
    from fourier_vllm.engine.cache.stock_capacity import stock_capacity
    from fourier_vllm.engine.recipe_choice import engine_recipe

    groups = kv_cache_config.kv_cache_groups
    local = next(g.kv_cache_spec for g in groups if isinstance(g.kv_cache_spec, FourierLocalSpec))
    pages = next(g for g in groups if isinstance(g.kv_cache_spec, FourierPageSpec))
    names = set(pages.layer_names)
    page_bytes = sum(
        len(tensor.layers) * tensor.layer_stride
        for tensor in kv_cache_config.kv_cache_tensors
        if names.issuperset(tensor.layers)
    )
    plain = 2 * local.num_kv_heads * local.head_size * local.dtype.itemsize
    sealed = page_bytes / len(names) / local.page_size
    recipe = engine_recipe(vllm_config)
    length = vllm_config.model_config.max_model_len
    ours = vllm_config.cache_config.kv_cache_size_tokens
    stock = stock_capacity(vllm_config, kv_cache_config)
    ratio = ours / max(stock, 1)
    logger.info_once(
        "fourier: recipe %s (%s); sealed pages of %d tokens, %.0f bytes a token and layer instead of "
        "%d (%.2fx smaller); %s raw tokens a request at most; %s tokens at %s a request where "
        "stock attention would hold %s (%.2fx)",
        recipe.target,
        recipe.source,
        local.page_size,
        sealed,
        plain,
        plain / sealed,
        f"{local.sliding_window:,}",
        f"{ours:,}",
        f"{length:,}",
        f"{stock:,}",
        ratio,
    )
    if ratio < WORTH_IT:
        logger.warning_once(
            "fourier: compression gains little here (%.2fx the tokens of stock attention): at "
            "--max-model-len %d the raw tokens of a request%s weigh as much as what pages save; leave "
            "out --attention-backend fourier unless requests get longer",
            ratio,
            length,
            " and the layers that are not compressed" if len(groups) > 1 + local.num_groups else "",
        )


def log_predicted(target: str, reason: str | None) -> None:
    """Log that bits are predicted; `reason` says as a clause why, None that the user wants it so."""
    if reason is not None:
        logger.warning_once(
            "fourier: this model is not measured: %s; bits are predicted from its weights for target %s; "
            "smaller pages of the same quality need a recipe: `fourier-vllm calibrate` makes one for the "
            "option `recipe`",
            reason,
            target,
        )
    ratio, held = TARGETS[target].ratio, TARGETS[PREDICTED_TARGET].ratio
    if ratio is not None and held is not None and ratio > held:
        logger.warning_once(
            "fourier: predicted bits at target %s lost answers of real models in tests: leave out `target` "
            "and `recipe`",
            target,
        )
