"""Switches off the KV cache quantisation that a checkpoint asks for: sealed pages take its place.

vLLM turns `--kv-cache-dtype auto` into what the checkpoint brings, at one of two moments: ModelOpt's
schemes while the engine's configuration is made, compressed-tensors' when a layer is made. Checkpoints of
other formats (fp8, Quark) only carry scales, which are loaded and never applied to 16-bit caches.
"""

from __future__ import annotations

from typing import Any

import torch

from fourier_vllm.engine.start_log import logger

NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def leave_kv_scheme(vllm_config: Any) -> None:
    """Choose the model's dtype for the KV cache where the checkpoint, not the user, chose another.

    Raises
    ------
    ValueError
        The scheme cannot be switched off for a model in float32.
    """
    from vllm.utils.torch_utils import resolve_kv_cache_dtype_string

    model, cache = vllm_config.model_config, vllm_config.cache_config
    if model is None:
        return
    if cache.cache_dtype not in ("auto", *NAMES.values()):
        # Who asks for the same by hand is told the same.
        if cache.cache_dtype != resolve_kv_cache_dtype_string("auto", model):
            return
    elif cache.cache_dtype != "auto" or not _has_layer_scheme(vllm_config.quant_config):
        return
    if model.dtype not in NAMES:
        raise ValueError(
            "attention backend fourier cannot switch off this checkpoint's KV cache scheme for a model "
            "in float32: use --dtype bfloat16."
        )
    cache.cache_dtype = NAMES[model.dtype]
    logger.info_once(
        "fourier: the checkpoint's KV cache scheme is not used: pages take its place, and recent "
        "tokens stay %s",
        cache.cache_dtype,
    )


def _has_layer_scheme(quant_config: Any) -> bool:
    return getattr(quant_config, "kv_cache_scheme", None) is not None
