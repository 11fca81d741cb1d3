"""What the engine makes of a recipe: a layer's pages have one size on all ranks."""

from __future__ import annotations

from collections import Counter

import pytest

from fourier_vllm.config import FourierConfig
from fourier_vllm.engine.recipe_choice import EngineRecipe
from fourier_vllm.engine.sizes import layer_layout, page_layout, page_sizes
from fourier_vllm.recipe import LayerRecipe, ModelFingerprint, Provenance, Recipe, target_recipe

SHAPE = ModelFingerprint(
    architecture="LlamaForCausalLM", num_layers=8, num_heads=16, num_kv_heads=4, head_size=64
)


def engine_of(recipe: Recipe) -> EngineRecipe:
    geometry = FourierConfig().geometry(recipe)
    return EngineRecipe(recipe.model, geometry, recipe, recipe.name, "windowed", "test")


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("target", ["paper", "lossless"])
def test_pages_of_a_layer_have_one_size(target: str, world: int) -> None:
    engine = engine_of(target_recipe(SHAPE, target))
    for layer in range(8):
        sizes = {
            layer_layout(engine, layer, rank, world, 2, None).page_bytes for rank in range(world)
        }
        assert sizes == {page_sizes(engine, world, 2)[layer]}


@pytest.mark.parametrize("v_bits", [(2, 2, 2, 2), (2, 4, 2, 4), (2, 3, 4, 8), (2, 2, 2, 4), (2, 4)])
def test_page_sizes_are_no_pattern(v_bits: tuple[int, ...]) -> None:
    """vLLM cuts the raw caches to pieces where every page size is there equally often."""
    shape = SHAPE.model_copy(update={"num_layers": len(v_bits)})
    engine = engine_of(
        Recipe(
            name="mixed",
            model=shape,
            coefficients=4,
            layers=[LayerRecipe(k=[[2] * 64] * 4, v=v) for v in v_bits],
            provenance=Provenance(source="manual"),
        )
    )
    sizes = page_sizes(engine, 1, 2)
    counts = Counter(sizes)
    assert len(counts) == 1 or len(set(counts.values())) > 1
    alone = [page_layout(engine, layer, 2).page_bytes for layer in engine.recipe.layers]
    assert all(a <= b for a, b in zip(alone, sizes, strict=True))
    assert sum(a != b for a, b in zip(alone, sizes, strict=True)) <= 1
