"""Which recipe an engine runs, and what it makes of one layer on one rank."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

from fourier_vllm.config import FourierConfig, Geometry
from fourier_vllm.page import PAGE_ALIGNMENT, PageLayout, align
from fourier_vllm.recipe import (
    MEASURED_TARGET,
    PREDICTED_TARGET,
    TARGETS,
    LayerRecipe,
    ModelFingerprint,
    Recipe,
    find_bundled,
    target_recipe,
)
from fourier_vllm.window import Window

# Raw blocks share one pool of block ids with pages: a bigger one would widen every id.
LOCAL_BLOCK_SIZES = (256, 128, 64, 32, 16, 8)
ALL_KEPT = "lossless"
FRAGMENT_ROOM = 1.02  # what fragment order may add to pages whose bits follow from the weights


@dataclass(frozen=True)
class EngineRecipe:
    """A recipe as resolved for one engine.

    Attributes
    ----------
    recipe : Recipe or None
        None: each layer derives its bits from its weights.
    target : str
        Named target the weights are allocated for, where `recipe` is None.
    source : str
        Where it came from, for the log.
    fragments : bool
        Pages are in fragment order where a layer can have it: on GPUs.
    """

    fingerprint: ModelFingerprint
    geometry: Geometry
    recipe: Recipe | None
    target: str
    prefill: str
    source: str
    fragments: bool = False

    @property
    def coefficients(self) -> int:
        if self.recipe is not None:
            return self.recipe.coefficients
        return TARGETS[self.target].coefficients(self.geometry.page_size)

    @property
    def coefficient_bits(self) -> int:
        if self.recipe is not None:
            return self.recipe.coefficient_bits
        return TARGETS[self.target].coefficient_bits

    def layout(self, bits: LayerRecipe, itemsize: int) -> PageLayout:
        """Pages of a layer with `bits`."""
        return PageLayout.build(
            bits.k,
            bits.v,
            head_size=self.fingerprint.head_size,
            page_size=self.geometry.page_size,
            coefficients=self.coefficients,
            coefficient_bits=self.coefficient_bits,
            itemsize=itemsize,
            fragments=self.fragments,
        )

    def window(self, ratio: float) -> Window:
        """Sizes of the local cache beside pages that are `ratio` times smaller than raw ones."""
        geometry = self.geometry
        fitting = [b for b in LOCAL_BLOCK_SIZES if b * ratio <= geometry.page_size]
        size = geometry.local_block_size or (fitting or LOCAL_BLOCK_SIZES[-1:])[0]
        return Window(
            page_size=geometry.page_size,
            local_window=geometry.local_window,
            sink_tokens=geometry.sink_tokens,
            block_size=size,
            exact_prefill=self.prefill == "exact",
        )


def num_local_groups(num_layers: int, id_bytes: int, block_bytes: int) -> int:
    """Cache groups vLLM makes of the raw caches: as many layers in one as fit into the `id_bytes` that
    the pages of all layers take."""
    return -(-num_layers // max(id_bytes // block_bytes, 1))


def compressed_layers(model_config: Any) -> list[int]:
    """Indices of the layers with full attention, the ones that are compressed."""
    config = model_config.hf_text_config
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [i for i, kind in enumerate(kinds) if kind == "full_attention"]


def fingerprint_of(model_config: Any) -> ModelFingerprint:
    """The shape of an engine's model, as recipes name it."""
    config = model_config.hf_text_config
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    theta = rope.get("rope_theta") or getattr(config, "rope_theta", None)
    return ModelFingerprint(
        # As the checkpoint says: vLLM's transformers backend runs it under another name.
        architecture=(model_config.architectures or [model_config.architecture])[0],
        num_layers=len(compressed_layers(model_config)),
        num_heads=config.num_attention_heads,
        num_kv_heads=model_config.get_total_num_kv_heads(),
        head_size=model_config.get_head_size(),
        rope_theta=float(theta) if theta else None,
    )


def engine_recipe(vllm_config: Any) -> EngineRecipe:
    """Resolve the engine's recipe: the option, the model's config, a bundled one, the weights.

    Where no target is named, a measured recipe is taken at `MEASURED_TARGET`, else the weights' prediction at
    `PREDICTED_TARGET`, which is larger.

    Raises
    ------
    ValueError
        Options or recipe cannot work, in one sentence.
    """
    options = FourierConfig.from_engine(vllm_config)
    fingerprint = fingerprint_of(vllm_config.model_config)
    target = options.target or MEASURED_TARGET
    recipe, source = None, "predicted from the weights"
    embedded = getattr(vllm_config.model_config.hf_config, "fourier_attention", None)
    if options.recipe is not None:
        recipe, source = _load(options.recipe), options.recipe
    elif embedded is not None:
        recipe, source = Recipe.from_dict(embedded, "fourier_attention"), "the model's config"
    elif target == ALL_KEPT:
        page = options.geometry().page_size
        recipe, source = target_recipe(fingerprint, ALL_KEPT, page), "option target"
    elif options.page_size is None:
        recipe = _find_bundled(fingerprint, target)
        source = "bundled, " + recipe.provenance.source if recipe else source
    if recipe is not None:
        recipe.check_fits(fingerprint)
    return EngineRecipe(
        fingerprint=fingerprint,
        geometry=options.geometry(recipe),
        recipe=recipe,
        target=recipe.name if recipe else options.target or PREDICTED_TARGET,
        prefill=options.prefill,
        source=source,
        fragments=vllm_config.device_config.device_type == "cuda",
    )


# Every layer resolves the recipe; the files are read once a process.
_load = lru_cache(maxsize=8)(Recipe.load)
_find_bundled = lru_cache(maxsize=8)(find_bundled)


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
        return replace(engine.layout(bits, itemsize), page_bytes=page_bytes)
    assert projections is not None
    from fourier_vllm.calibration.predict import layer_recipe, page_bytes_for

    bits = layer_recipe(
        engine.fingerprint, engine.target, ordinal, engine.geometry.page_size, projections
    )
    layout = plain = replace(engine, fragments=False).layout(bits, itemsize)
    page_bytes = page_bytes_for(plain, engine.target)
    if TARGETS[engine.target].ratio is None:  # fixed counts of raw dims, not the same in all layers
        counts = target_recipe(engine.fingerprint, engine.target, engine.geometry.page_size)
        page_bytes = max(page_sizes(replace(engine, recipe=counts), world, itemsize))
    elif engine.fragments:
        # Bits were chosen to fill pages in plain order.
        page_bytes = align(int(page_bytes * FRAGMENT_ROOM), PAGE_ALIGNMENT)
        fragments = engine.layout(bits, itemsize)
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
        max(engine.layout(bits, itemsize).page_bytes for bits in of_layer)
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
