"""The shape of an engine's model, as recipes name it."""

from __future__ import annotations

from typing import Any

from fourier_vllm.recipe import ModelFingerprint


def compressed_layers(model_config: Any) -> list[int]:
    """Indices of the layers with full attention, the ones that are compressed."""
    config = model_config.hf_text_config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [i for i, kind in enumerate(kinds) if kind == "full_attention"]


def fingerprint_of(model_config: Any) -> ModelFingerprint:
    """The shape of an engine's model, as recipes name it."""
    config = model_config.hf_text_config
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    theta = rope.get("rope_theta") or getattr(config, "rope_theta", None)
    return ModelFingerprint(
        # As the checkpoint says: vLLM's transformers backend runs it under another name.
        architecture=(model_config.architectures or [model_config.architecture])[0],
        num_layers=len(compressed_layers(model_config)),
        num_heads=config.num_attention_heads,
        num_kv_heads=model_config.get_total_num_kv_heads(),
        head_size=model_config.get_head_size(),
        rope_theta=float(theta) if theta else None,
    )
