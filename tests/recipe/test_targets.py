"""Recipes that a target gives without any statistics."""

import pytest

from fourier_vllm.recipe import (
    LayerRecipe,
    Recipe,
    RecipeError,
    paper_counts,
    target_recipe,
)
from tests.support.recipes import MODEL


def test_lossless():
    recipe = target_recipe(MODEL, "lossless", page_size=32)
    assert recipe.coefficients == 0
    assert all(layer == LayerRecipe(k=[[16] * 8] * 4, v=16) for layer in recipe.layers)
    assert Recipe.loads(recipe.dumps()) == recipe


@pytest.mark.parametrize("head_size", [8, 64, 80, 128])
@pytest.mark.parametrize("num_layers", [1, 4, 24, 30, 32])
def test_paper(num_layers, head_size):
    model = MODEL.model_copy(update={"num_layers": num_layers, "head_size": head_size})
    recipe = target_recipe(model, "paper")
    assert (recipe.coefficients, recipe.coefficient_bits) == (16, 16)
    counts = paper_counts(num_layers, head_size)
    for layer, (k, v) in zip(recipe.layers, counts, strict=True):
        assert all(row.count(16) == k and row.count(0) == head_size - k for row in layer.k)
        assert all(row.count(16) == v and row.count(0) == head_size - v for row in layer.v)
        assert k % 8 == v % 8 == 0
    if num_layers == 32 and head_size == 128:
        kept = sum(k + v for k, v in counts) / (2 * num_layers * head_size)
        assert kept == pytest.approx(0.24, abs=0.02)


@pytest.mark.parametrize("target", ["balanced", "nonsense"])
def test_target_recipe_refuses(target):
    with pytest.raises(RecipeError, match="target"):
        target_recipe(MODEL, target)
