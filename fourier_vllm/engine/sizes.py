"""What a recipe comes to on one rank: pages of a layer, block ids, the local cache beside them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

from fourier_vllm.engine.recipe_choice import EngineRecipe
from fourier_vllm.page import PAGE_ALIGNMENT, PageLayout, align
from fourier_vllm.recipe import TARGETS, LayerRecipe, Recipe, target_recipe
from fourier_vllm.window import Window

# Raw blocks share one pool of block ids with pages: a bigger one would widen every id.
LOCAL_BLOCK_SIZES = (256, 128, 64, 32, 16, 8)
FRAGMENT_ROOM = 1.02  # what fragment order may add to pages whose bits follow from the weights


def page_layout(engine: EngineRecipe, bits: LayerRecipe, itemsize: int) -> PageLayout:
    """Pages of a layer with `bits`."""
    return PageLayout.build(
        bits.k,
        bits.v,
        head_size=engine.fingerprint.head_size,
        page_size=engine.geometry.page_size,
        coefficients=engine.coefficients,
        coefficient_bits=engine.coefficient_bits,
        itemsize=itemsize,
        fragments=engine.fragments,
    )


def window_of(engine: EngineRecipe, ratio: float) -> Window:
    """Sizes of the local cache beside pages that are `ratio` times smaller than raw ones."""
    geometry = engine.geometry
    fitting = [b for b in LOCAL_BLOCK_SIZES if b * ratio <= geometry.page_size]
    size = geometry.local_block_size or (fitting or LOCAL_BLOCK_SIZES[-1:])[0]
    return Window(
        page_size=geometry.page_size,
        local_window=geometry.local_window,
        sink_tokens=geometry.sink_tokens,
        block_size=size,
        exact_prefill=engine.prefill == "exact",
    )


def num_local_groups(num_layers: int, id_bytes: int, block_bytes: int) -> int:
    """Cache groups vLLM makes of the raw caches: as many layers in one as fit into the `id_bytes` that
    the pages of all layers take."""
    return -(-num_layers // max(id_bytes // block_bytes, 1))


def layer_layout(
    engine: EngineRecipe, ordinal: int, rank: int, world: int, itemsize: int, projections: Any
) -> PageLayout:
    """Pages of the `ordinal`-th compressed layer on one tensor-parallel rank.

    Pages of a layer have one size on all ranks. Without a recipe a rank sees only its own layers, one by
    one, and pages have one size in all of them.

    Parameters
    ----------
    projections : Projections or None
        None where there is a recipe.
    """
    if engine.recipe is not None:
        bits = _rank_recipe(engine.recipe, rank, world).layers[ordinal]
        page_bytes = page_sizes(engine, world, itemsize)[ordinal]
        return replace(page_layout(engine, bits, itemsize), page_bytes=page_bytes)
    assert projections is not None
    from fourier_vllm.calibration.predict import layer_recipe, page_bytes_for

    bits = layer_recipe(
        engine.fingerprint, engine.target, ordinal, engine.geometry.page_size, projections
    )
    layout = plain = page_layout(replace(engine, fragments=False), bits, itemsize)
    page_bytes = page_bytes_for(plain, engine.target)
    if TARGETS[engine.target].ratio is None:  # fixed counts of raw dims, not the same in all layers
        counts = target_recipe(engine.fingerprint, engine.target, engine.geometry.page_size)
        page_bytes = max(page_sizes(replace(engine, recipe=counts), world, itemsize))
    elif engine.fragments:
        # Bits were chosen to fill pages in plain order.
        page_bytes = align(int(page_bytes * FRAGMENT_ROOM), PAGE_ALIGNMENT)
        fragments = page_layout(engine, bits, itemsize)
        layout = fragments if fragments.page_bytes <= page_bytes else plain
    return replace(layout, page_bytes=max(layout.page_bytes, page_bytes))


@lru_cache(maxsize=8)
def page_sizes(engine: EngineRecipe, world: int, itemsize: int) -> tuple[int, ...]:
    """Bytes of a page in each layer of a recipe, enough for every rank.

    vLLM takes layers of several page sizes, equally many of each, for a repeating pattern and would cut
    the raw caches to match it; then one page is padded to the next size.
    """
    assert engine.recipe is not None
    ranks = [_rank_recipe(engine.recipe, rank, world).layers for rank in range(world)]
    sizes = [
        max(page_layout(engine, bits, itemsize).page_bytes for bits in of_layer)
        for of_layer in zip(*ranks, strict=True)
    ]
    counts = Counter(sizes)
    if len(counts) > 1 and len(set(counts.values())) == 1:
        small, large = min(pairwise(sorted(counts)), key=lambda pair: pair[1] - pair[0])
        sizes[sizes.index(small)] = large
    return tuple(sizes)


def id_bytes(engine: EngineRecipe, world: int, layout: PageLayout) -> int:
    """Bytes of a block id: a page of every layer; `layout` is one of them."""
    if engine.recipe is None:
        return engine.fingerprint.num_layers * layout.page_bytes
    return sum(page_sizes(engine, world, layout.itemsize))


@lru_cache(maxsize=64)
def _rank_recipe(recipe: Recipe, rank: int, world: int) -> Recipe:
    return recipe.rank_slice(rank, world)
