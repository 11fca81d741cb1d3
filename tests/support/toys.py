"""Tiny randomly initialised models, one a family: right in every mechanism, meaningless in text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

VOCAB_SIZE = 512
MAX_POSITIONS = 2048

COMMON: dict[str, Any] = dict(
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=MAX_POSITIONS,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)

# family: model class without ForCausalLM, and what differs from COMMON
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-mha": ("Llama", dict(num_key_value_heads=4)),
    "llama-mqa": ("Llama", dict(num_key_value_heads=1, head_dim=64)),
    "llama-wide": ("Llama", dict(head_dim=80)),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "phi3": ("Phi3", {}),
    "granite": ("Granite", dict(attention_multiplier=0.2)),
    # Sizes that kernels for quantised weights take.
    "llama-128": ("Llama", dict(intermediate_size=256, num_hidden_layers=2)),
    "qwen3-moe": (
        "Qwen3Moe",
        dict(
            num_hidden_layers=2,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            norm_topk_prob=True,
        ),
    ),
    "gemma3": (
        "Gemma3",
        dict(
            sliding_window=64,
            query_pre_attn_scalar=32,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
    ),
}


def make_toy(folder: Path, family: str) -> Path:
    """Write a toy model of `family` below `folder`; returns its folder."""
    path = folder / family
    if path.exists():
        return path
    name, changes = FAMILIES[family]
    config_name = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    config = getattr(transformers, config_name)(**{**COMMON, **changes}, dtype="float32")
    save_random(getattr(transformers, f"{name}ForCausalLM"), config, path)
    return path


def save_random(model_class: Any, config: Any, path: Path) -> None:
    """Write a model of `config` with random weights."""
    torch.manual_seed(0)
    model = model_class(config)
    for name, parameter in model.named_parameters():
        # Weights large enough that far tokens matter; biases and norms away from their defaults.
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(path)


def byte_tokenizer(special: Iterable[str] = ()) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer whose tokens are bytes, and `special` ones behind them."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=list(special),
    )


def add_tokenizer(folder: Path) -> Path:
    """Give a toy model a tokenizer whose tokens are bytes; returns its folder."""
    byte_tokenizer().save_pretrained(folder)
    return folder
