"""A valid recipe to change, and what a refusal looks like."""

import time

import pytest

from fourier_vllm.recipe import (
    ModelFingerprint,
    Recipe,
    RecipeError,
)

MODEL = ModelFingerprint(
    architecture="LlamaForCausalLM",
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_size=8,
    rope_theta=100000.0,
)


VALID = {
    "format": 1,
    "name": "balanced",
    "model": MODEL.model_dump(),
    "page_size": 128,
    "sink_tokens": 16,
    "local_window": 256,
    "coefficients": 4,
    "coefficient_bits": 8,
    "layers": [
        {"k": [[h, 16, 8, 4, 2, 0, 0, 0] for h in (0, 2, 4, 8)], "v": 2},
        {"k": [[0] * 8] * 4, "v": [[2 * h, 16, 8, 4, 2, 0, 0, 0] for h in (0, 1, 2, 4)]},
    ],
    "provenance": {"source": "calibrated", "text": "books", "tokens": 9, "kl": 0.01, "nll": -1},
}


def refusal(text) -> str:
    """The one-line message with which `text` is refused, quickly."""
    start = time.thread_time()
    with pytest.raises(RecipeError) as caught:
        Recipe.loads(text)
    assert time.thread_time() - start < 5
    return checked(caught.value)


def checked(error) -> str:
    message = str(error)
    assert len(message.splitlines()) == 1
    assert len(message) < 400
    assert message.isascii()
    return message
