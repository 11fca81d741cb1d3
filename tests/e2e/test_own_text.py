"""The option `own-text` in a real engine: the first start makes the recipe, the second finds it."""

from __future__ import annotations

import shutil

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from fourier_vllm.engine import own_recipe
from fourier_vllm.recipe import Recipe
from tests.support.engine import engine, generate, prompts, tokens
from tests.support.toys import VOCAB_SIZE

FOURIER = dict(recipe="own-text", target="compact", page_size=32, local_window=48, sink_tokens=16)


@pytest.fixture
def model(toy, tmp_path):
    """A toy that can be calibrated: with a tokenizer."""
    folder = tmp_path / "Toy"
    shutil.copytree(toy(), folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w1", eos_token="w2", pad_token="w0"
    ).save_pretrained(folder)
    return folder


def test_made_at_the_first_start(model, tmp_path, monkeypatch):
    monkeypatch.setenv("FOURIER_CACHE", str(tmp_path / "cache"))
    results = []
    for _ in range(2):
        with engine(model, FOURIER) as llm:
            results.append(tokens(generate(llm, prompts()[2:], 40)))
            options = llm.llm_engine.vllm_config.additional_config["fourier"]
        monkeypatch.setattr(own_recipe, "_make", lambda *_: pytest.fail("made again"))
    assert results[0] == results[1]
    recipe = Recipe.load(options["recipe"])
    assert (recipe.name, recipe.page_size, recipe.local_window) == ("compact", 32, 48)
    assert recipe.provenance.text == "written by the model itself, temperature 0.6"
    assert recipe.provenance.tokens == 16384
    files = sorted(path.suffix for path in (tmp_path / "cache" / "recipes").iterdir())
    assert files == [".json", ".lock"]
