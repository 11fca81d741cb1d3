"""Tiny transformers models of every family, texts and a tokenizer for them, and their calibration."""

from types import SimpleNamespace

import torch
import transformers

from fourier_vllm import cli

W, M, S, L = 32, 1, 5, 40  # tokens a page, coefficients, sinks, local window


COMMON = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=97,
    max_position_embeddings=512,
)


FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma3": dict(
        sliding_window=24,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    ),
}


def tiny(family):
    config_name = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    config_class = getattr(transformers, config_name)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(
        config_class(**{**COMMON, **FAMILIES[family]}, attn_implementation="sdpa")
    )
    for name, parameter in model.named_parameters():
        # Away from the defaults: biases are zero and norms one.
        if parameter.dim() > 1 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def texts(*lengths):
    g = torch.Generator().manual_seed(1)
    return [torch.randint(0, COMMON["vocab_size"], (n,), generator=g) for n in lengths]


class Words:
    """A tokenizer of one token a word."""

    bos_token_id = 1

    def __init__(self, bos=True):
        self.bos = bos

    def __call__(self, text, add_special_tokens=True, **_):
        ids = [int(word) for word in text.split()]
        return SimpleNamespace(input_ids=[1] * (self.bos and add_special_tokens) + ids)


def calibrate(folder, *options, target="compact"):
    """`fourier-vllm calibrate` on the text of `folder`; returns the exit code."""
    return cli.main(
        ["calibrate", "some/Tiny-Model", "--text", str(folder / "text"), "--page-size", "32",
         "--local-window", "32", *(["--target", target] if target else []), "--no-check", *options]
    )  # fmt: skip
