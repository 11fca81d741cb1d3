"""Models with quantised weights: stock attention's tokens, and recipes derived from those weights.

In 16 bits, which kernels for such weights need: two tokens nearer than the rounding may change places.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.test_gpu_engine import GPU, GRAPHS
from tests.support.engine import (
    KERNELS_LOSSLESS,
    LOSSLESS,
    assert_same_but_for_ties,
    digest,
    engine,
    generate,
    prompts,
    tokens,
)
from tests.support.quantised import FORMATS, quantise
from tests.support.toys import add_tokenizer

# What 16 bits change in log-probabilities of these random models; another page changes them by more than 1.
TIES = {"float16": 0.05, "bfloat16": 0.5}
BALANCED = LOSSLESS | {"target": "balanced"}
ONLINE_INT8 = dict(quantization="int8_per_channel_weight_only")


@pytest.fixture(scope="module")
def quantised(toy, tmp_path_factory):
    """Maker of toy models with quantised weights: `quantised("awq")` is a folder."""
    folder = tmp_path_factory.mktemp("quantised")
    return lambda name: quantise(toy("llama-128"), folder, name)


def turns(llm: Any) -> list[Any]:
    """Prompts in chunks beside each other, the same again (prefix hits), and a longer one of these."""
    ids = prompts()[2:5]
    asked = (ids, ids, [ids[1] + ids[0][:20]])
    return [output for x in asked for output in generate(llm, x, 16, logprobs=20)]


def run(model: Path, fourier: dict[str, Any] | None, **options: Any) -> list[Any]:
    with engine(model, fourier, **options) as llm:
        return turns(llm)


@pytest.mark.parametrize(
    ("name", "dtype"),
    # int8 activations are multiplied in bfloat16 only where a CPU has AMX.
    [("int8", "bfloat16"), ("w4a16", "float16"), ("gptq", "float16"), ("awq", "float16")],
)
def test_tokens_equal_stock(quantised, name, dtype):
    stock, lossless = (run(quantised(name), x, dtype=dtype) for x in (None, LOSSLESS))
    assert_same_but_for_ties(lossless, stock, TIES[dtype])


@pytest.mark.parametrize("recipe", ["weights", "measured"])
@pytest.mark.parametrize("name", ["int8", "w4a16", "gptq", "awq"])
def test_recipe_from_quantised_weights(quantised, name, recipe, tmp_path, monkeypatch):
    """In the usual dtype, where layers hold codes in it, scales in float32 and packed words."""
    monkeypatch.setenv("FOURIER_CACHE", str(tmp_path))
    model, fourier = add_tokenizer(quantised(name)), BALANCED | {"recipe": recipe}
    with engine(model, fourier, dtype="bfloat16", skip_tokenizer_init=False) as llm:
        (tokens_,) = tokens(generate(llm, prompts()[3:4], 8))
    assert len(tokens_) == 8
    assert len(list(tmp_path.glob("recipes/*.json"))) == (recipe == "measured")


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="vLLM's kernel needs AMX")
def test_online_int8(toy):
    """vLLM quantises the experts of a mixture, and no other layer, while it loads them."""
    options = dict(dtype="bfloat16", **ONLINE_INT8)
    stock, lossless, derived = (
        run(toy("qwen3-moe"), x, **options) for x in (None, LOSSLESS, BALANCED)
    )
    assert_same_but_for_ties(lossless, stock, TIES["bfloat16"])
    with pytest.raises(AssertionError, match="log-prob"):
        assert_same_but_for_ties(derived, stock, TIES["bfloat16"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*FORMATS, "fp8 online", "int8 online"])
def test_on_a_gpu(toy, quantised, name, record_property):
    """Checkpoints of every format, and weights quantised while they are loaded; with CUDA graphs."""
    options = GPU | GRAPHS | dict(dtype="bfloat16")
    if name == "fp8 online":
        model, options = toy("llama-128"), options | dict(quantization="fp8")
    elif name == "int8 online":
        model, options = toy("qwen3-moe"), options | ONLINE_INT8
    else:
        model = quantised(name)
    stock, lossless = (run(model, x, **options) for x in (None, KERNELS_LOSSLESS))
    record_property("stock", digest(tokens(stock)))
    record_property("ours", digest(tokens(lossless)))
    assert_same_but_for_ties(lossless, stock, TIES["bfloat16"])
    derived = run(model, KERNELS_LOSSLESS | {"target": "balanced"}, **options)
    with pytest.raises(AssertionError, match="log-prob"):
        assert_same_but_for_ties(derived, stock, TIES["bfloat16"])
