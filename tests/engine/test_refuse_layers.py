"""Attention layers that are refused, each in one sentence."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention

from fourier_vllm.engine.binding import compressed_here
from fourier_vllm.engine.refuse import (
    check_built,
    check_layer,
    check_stage,
)
from tests.support.refusals import check_sentence
from tests.support.scheduling import engine_config

LAYER: dict[str, Any] = dict(
    head_size=64,
    alibi_slopes=None,
    logits_soft_cap=None,
    attn_type="decoder",
    kv_sharing_target=None,
    extra={},
)


@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 112, 128, 192, 256])
def test_good_layers(head_size):
    check_layer(**LAYER | dict(head_size=head_size))
    check_layer(**LAYER | dict(logits_soft_cap=0.0, extra={"sinks": None, "chunk_lookback": -1}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(alibi_slopes=[0.5]), "ALiBi"),
        (dict(logits_soft_cap=50.0), "soft caps"),
        (dict(attn_type="encoder"), "encoder attention"),
        (dict(attn_type="encoder_only"), "encoder_only attention"),
        (dict(attn_type="encoder_decoder"), "encoder_decoder attention"),
        (dict(kv_sharing_target="model.layers.0.self_attn.attn"), "share another layer's KV cache"),
        (dict(extra={"sinks": torch.ones(4)}), "learned attention sinks"),
        (
            dict(extra={"layer_idx": 1, "dual_chunk_attention_config": {"chunk_size": 64}}),
            "dual chunk attention",
        ),
        (dict(extra={"chunk_lookback": 2}), "chunked attention"),
        (dict(extra={"of_another_vllm": 1}), "the argument 'of_another_vllm' of attention layers"),
        (dict(head_size=16), "head size 16 (multiples of 8 from 32 to 256 work)"),
        (dict(head_size=36), "head size 36"),
        (dict(head_size=264), "head size 264"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_layers(changes, words):
    with pytest.raises(ValueError, match="attention backend fourier") as caught:
        check_layer(**LAYER | changes)
    check_sentence(str(caught.value), words, "leave out --attention-backend fourier")


def make_layer(config, num_heads: int, num_kv_heads: int, head_size: int, **options) -> None:
    """A layer of a model with 4 query heads and 2 KV heads of 32, as vLLM's models make them."""
    with set_current_vllm_config(config):
        Attention(
            num_heads, head_size, 1.0, num_kv_heads, cache_config=config.cache_config, **options
        )


@pytest.mark.parametrize("world", [1, 2, 4])
def test_layers_of_other_shapes(tmp_path, world):
    """Models may give layers heads of their own, where recipes and scratch are made for one shape."""
    sizes = dict(tensor_parallel_size=world, distributed_executor_backend="mp")
    config = engine_config(tmp_path, attention_backend="fourier", max_model_len=512, **sizes)
    good = 4 // world, max(2 // world, 1), 32
    make_layer(config, *good, prefix="layers.0.attn")
    others = {(8, good[1], 32), (good[0], good[0], 32), (good[0], good[1], 64)} - {good}
    for i, bad in enumerate(others, 1):
        with pytest.raises(ValueError, match="layers of different shapes") as caught:
            make_layer(config, *bad, prefix=f"layers.{i}.attn")
        words = f"{bad} in one, {good} in the model's config", "leave out --attention-backend"
        check_sentence(str(caught.value), *words)
    # What has a sliding window of its own is not compressed.
    make_layer(config, 4, 1, 32, prefix="layers.4.attn", per_layer_sliding_window=64)


def test_built_layers():
    def layer(kind: Any, values: int) -> Any:
        made = object.__new__(kind)
        made.__dict__.update(head_size=64, head_size_v=values)
        return made

    check_built(layer(Attention, 64))
    for built, words in (
        (layer(Attention, 32), "values of 32 dims beside keys of 64"),
        (layer(ChunkedLocalAttention, 64), "does not support ChunkedLocalAttention"),
    ):
        with pytest.raises(ValueError, match="does not support") as caught:
            check_built(built)
        check_sentence(str(caught.value), words, "leave out --attention-backend fourier")


def test_stages_with_fewer_layers_than_groups():
    check_stage(2, 2, 32)
    with pytest.raises(ValueError, match="does not support") as error:
        check_stage(4, 2, 32)
    check_sentence(str(error.value), "pages of 32 tokens", "--pipeline-parallel-size", "4 groups")


def test_layers_with_a_window_get_no_pages():
    """A stage's layers are counted without them, and without caches that stand beside layers."""
    full, sliding = (SimpleNamespace(impl=SimpleNamespace(is_compressed=x)) for x in (True, False))
    layers = {"a": full, "b": sliding, "stock": SimpleNamespace(impl=object()), "cache": object()}
    assert list(compressed_here(layers)) == ["a"]
