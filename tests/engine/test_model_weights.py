"""What the prediction of bits assumes of a layer is what the layer does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fourier_vllm.engine.model_weights import NORMS, UnreadableError, read_projections
from tests.support.numerics import assert_close

HIDDEN, HEADS, KV_HEADS, D = 64, 4, 2, 32
WIDTH = (HEADS + 2 * KV_HEADS) * D


class Rms(nn.Module):
    def __init__(self, plus: float) -> None:
        super().__init__()
        self.weight, self.plus = nn.Parameter(torch.randn(HIDDEN)), plus

    def forward(self, x):
        return x * x.square().mean(-1, keepdim=True).rsqrt() * (self.weight + self.plus)


def layer_norm(bias: bool) -> nn.Module:
    norm = nn.LayerNorm(HIDDEN, bias=bias)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


class Quantised(nn.Module):
    """As vLLM's quantised layers: packed weights, scales in float32, activations in 16 bits alone."""

    input_size = HIDDEN

    def __init__(
        self, tensors: dict[str, torch.Tensor], dtype: torch.dtype, bias: bool = True
    ) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.register_buffer("codes", torch.zeros(1, dtype=torch.int32))
        self.dtype = dtype
        self.dense = torch.randn(WIDTH, HIDDEN)
        self.offset = torch.randn(WIDTH) if bias else torch.zeros(WIDTH)

    def forward(self, x):
        assert x.dtype is self.dtype
        assert x.abs().amax(-1).gt(0).all(), "a row of zeros has no scale"
        return x.float() @ self.dense.T + self.offset, None


FORMATS = {
    "int8": dict(weight=torch.zeros(1, dtype=torch.int8), weight_scale=torch.ones(1)),
    "fp8": dict(weight=torch.zeros(1).to(torch.float8_e4m3fn), weight_scale=torch.ones(1)),
    "packed": dict(qweight=torch.zeros(1, dtype=torch.int32), scales=torch.ones(1).half()),
    "codes alone": {},
}


def rope(**changes):
    angles = torch.arange(8)[:, None] * (10000.0 ** -(torch.arange(D // 2) / (D // 2)))
    cache = torch.cat([angles.cos(), angles.sin()], 1)
    return SimpleNamespace(**{"cos_sin_cache": cache, "is_neox_style": True} | changes)


def layer(projection, norm=None, name="input_layernorm", rotary=None):
    attention, block = nn.Module(), nn.Module()
    attention.qkv_proj = projection
    if rotary is not None:
        attention.rotary_emb = rotary
    if norm is not None:
        setattr(block, name, norm)
    return SimpleNamespace(attention=attention, block=block)


def read(ancestry, dtype=torch.float32, **config):
    return read_projections(ancestry, HEADS, KV_HEADS, D, dtype, SimpleNamespace(**config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_quantised_layers_get_the_dtype_of_the_model(name, dtype):
    projection = Quantised(FORMATS[name], dtype)
    found = read(layer(projection, rotary=rope()), dtype)
    k = slice(HEADS * D, (HEADS + KV_HEADS) * D)
    assert_close("weight", projection.dense[k], found.k_weight, 1e-2)
    assert_close("bias", projection.offset[k], found.k_bias, 1e-2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(
    "make",
    [lambda: Rms(0.0), lambda: Rms(1.0), lambda: layer_norm(False), lambda: layer_norm(True)],
    ids=["rms", "gemma", "layer-norm", "layer-norm-with-bias"],
)
def test_keys_are_what_the_layer_makes(make, name, bias):
    """Of hidden states as the prediction takes them: of mean zero and unit energy."""
    projection, norm = Quantised({}, torch.float32, bias), make()
    found = read(layer(projection, norm, name, rope()))
    x = torch.randn(50, HIDDEN)
    x = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
    with torch.no_grad():
        true = projection(norm(x))[0][:, HEADS * D : (HEADS + KV_HEADS) * D]
    assumed = (x * found.norm_weight) @ found.k_weight.T
    if found.k_bias is not None:
        assumed = assumed + found.k_bias
    assert_close("keys", true, assumed, 1e-4)


def test_angles_of_rope():
    expected = rope().cos_sin_cache[1, D // 2 :].asin()
    projection = Quantised({}, torch.float32)
    found = read(layer(projection, rotary=rope())).rope_inv_freq
    torch.testing.assert_close(found, expected)
    cache = torch.cat([torch.zeros(4, D), rope().cos_sin_cache])
    for use_long, right in ((False, torch.zeros(D // 2)), (True, expected)):
        long = SimpleNamespace(
            long_short_cos_sin_cache=cache,
            original_max_position_embeddings=4,
            use_long_rope=use_long,
        )
        torch.testing.assert_close(read(layer(projection, rotary=long)).rope_inv_freq, right)


@pytest.mark.parametrize(
    ("rotary", "config", "words"),
    [
        (rope(is_neox_style=False), {}, "neighbouring dims"),
        (rope(), dict(no_rope_layers=[1, 0]), "without positions"),
        (None, dict(rope_parameters={"rope_theta": 1e4}), "no table"),
        (None, dict(rope_theta=1e4), "no table"),
        (SimpleNamespace(), {}, "no table"),
    ],
    ids=["gpt-j", "some-layers", "elsewhere", "elsewhere-old-config", "another-module"],
)
def test_positions_that_the_prediction_does_not_know(rotary, config, words):
    with pytest.raises(UnreadableError, match=words):
        read(layer(Quantised({}, torch.float32), rotary=rotary), **config)


def test_learned_positions_are_no_rope():
    assert read(layer(Quantised({}, torch.float32))).rope_inv_freq is None
