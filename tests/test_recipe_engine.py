"""What the engine makes of a recipe: one page size for all layers and ranks."""

from __future__ import annotations

import pytest

from fourier_vllm.config import FourierConfig
from fourier_vllm.engine.recipes import EngineRecipe, layer_layout
from fourier_vllm.recipe import ModelFingerprint, target_recipe

SHAPE = ModelFingerprint(
    architecture="LlamaForCausalLM", num_layers=8, num_heads=16, num_kv_heads=4, head_size=64
)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("target", ["paper", "lossless"])
def test_pages_have_one_size(target: str, world: int) -> None:
    recipe = target_recipe(SHAPE, target)
    geometry = FourierConfig().geometry(recipe)
    engine = EngineRecipe(SHAPE, geometry, recipe, target, "windowed", "test")
    sizes = {
        layer_layout(engine, layer, rank, world, 2, None).page_bytes
        for layer in range(8)
        for rank in range(world)
    }
    assert len(sizes) == 1


def test_without_recipe_and_weights_there_is_a_way_out() -> None:
    geometry = FourierConfig().geometry()
    engine = EngineRecipe(SHAPE, geometry, None, "balanced", "windowed", "test")
    with pytest.raises(ValueError, match="fourier-vllm calibrate"):
        layer_layout(engine, 0, 0, 1, 2, None)
