"""What a refusal of an engine looks like, and sizes of a small model."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.support.scheduling import engine_config

SIZES: dict[str, Any] = dict(vocab_size=512, max_position_embeddings=2048, dtype="bfloat16")


DECODER: dict[str, Any] = dict(
    SIZES,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)

FALCON: dict[str, Any] = dict(
    SIZES,
    architectures=["FalconForCausalLM"],
    model_type="falcon",
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    multi_query=True,
)


def check_sentence(message: str, *words: str) -> None:
    """One sentence of one line about the backend that holds `words`."""
    assert message.startswith("attention backend fourier")
    assert len(message.splitlines()) == 1
    assert len(message) < 400
    assert message.isascii()
    assert message.endswith(".")
    assert not re.search(r"\w{2}\. [A-Z]", message), "more than one sentence"
    for word in words:
        assert word in message


def refusal(folder, model=None, **options) -> str:
    """What ends the start in the user's own process; the folder has no weights to load."""
    options = dict(attention_backend="fourier", max_model_len=512, load_format="auto") | options
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        engine_config(folder, model, **options)
    assert type(caught.value) is ValueError, "pydantic's text, not ours"
    return str(caught.value)
