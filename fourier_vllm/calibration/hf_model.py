"""A Hugging Face model as calibration needs it: loaded, named and described."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fourier_vllm._text import clip, show
from fourier_vllm.recipe import ModelFingerprint

SAMPLED_WEIGHTS = 256  # of a tensor, at least where it has as many


def load(model: str) -> tuple[Any, Any]:
    """Model and tokenizer of a folder or a Hub id, on the GPU if there is one.

    Raises
    ------
    ValueError
        There is no such model, or `transformers` cannot load it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    cuda = torch.cuda.is_available()
    tokenizer = load_tokenizer(model)
    with _one_sentence(model):
        # CPUs multiply 16-bit numbers slowly.
        dtype = "auto" if cuda else torch.float32
        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation="sdpa"
        )
    return loaded.to("cuda" if cuda else "cpu").eval(), tokenizer


def can_be_watched(config: Any) -> bool:
    """Whether `transformers` runs this model's attention through its attention interface."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    made = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return bool(getattr(made, "_supports_attention_backend", False))


def load_tokenizer(model: str) -> Any:
    """Tokenizer of a folder or a Hub id; raises ValueError where there is none."""
    from transformers import AutoTokenizer

    with _one_sentence(model):
        return AutoTokenizer.from_pretrained(model)


@contextmanager
def _one_sentence(model: str) -> Iterator[None]:
    """What `transformers` raises for a model it cannot load, as one sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"model {show(model, 120)} cannot be loaded ({clip(lines[0].rstrip('.'), 160)}): give a"
            " folder with config.json and weights, or a Hub id of a text-generation model."
        ) from None


def model_name(model: str) -> str:
    """Name of a model without the folders above it; a Hub id stays."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.exists() else model


def digest_of(model: Any) -> str:
    """Tells models of one name apart: a hash over a few weights of every tensor."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // SAMPLED_WEIGHTS)].float().cpu()
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()


def text_config(model: Any) -> Any:
    """The part of a model's config that describes its decoder."""
    return model.config.get_text_config(decoder=True)


def full_attention_layers(model: Any) -> list[int]:
    """Indices of the layers that are compressed."""
    config = text_config(model)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [i for i, kind in enumerate(kinds) if kind == "full_attention"]


def max_tokens(model: Any) -> int:
    """Longest sequence that the model was made for."""
    return getattr(text_config(model), "max_position_embeddings", None) or 1 << 30


def fingerprint_of(model: Any) -> ModelFingerprint:
    """The shape of a model, as the engine names it."""
    config = text_config(model)
    heads = config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    theta = rope.get("rope_theta") or getattr(config, "rope_theta", None)
    return ModelFingerprint(
        architecture=(model.config.architectures or [type(model).__name__])[0],
        num_layers=len(full_attention_layers(model)),
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        rope_theta=float(theta) if theta else None,
    )
