"""Models that vLLM runs through transformers' code: stock attention's tokens, recipes of the same model."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def results(run_apart, tmp_path_factory):
    """Tokens by family and recipe."""
    return run_apart("tests.support.through_transformers", tmp_path_factory.mktemp("toys"))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_tokens_equal_stock(results, family):
    assert results[f"{family} lossless"] == results[f"{family} stock"]


def test_recipe_of_the_model(results):
    """It names the model by its checkpoint; vLLM runs every one as the same class here."""
    assert results["llama recipe"] == results["llama stock"]


def test_the_model_is_measured(results):
    """Through its own module, whatever code that is."""
    assert results["llama measured"] == results["llama measured, from its file"]
    assert results["llama measured"] != results["llama stock"]


def test_no_recipe_is_predicted(results):
    """RoPE's angles are in transformers' model, where the prediction does not look: it says so."""
    refusal = results["llama predicted"]
    assert "cannot predict one (its layers hold no table of RoPE's angles)" in refusal
    assert "make one with `fourier-vllm calibrate`" in refusal
