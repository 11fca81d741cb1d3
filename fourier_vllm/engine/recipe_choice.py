"""Which recipe an engine runs: the option's, the model's own, a bundled one, or the weights' prediction."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fourier_vllm.config import FourierConfig, Geometry
from fourier_vllm.engine.fingerprint import fingerprint_of
from fourier_vllm.recipe import (
    MEASURED_TARGET,
    PREDICTED_TARGET,
    TARGETS,
    ModelFingerprint,
    Recipe,
    find_bundled,
    target_recipe,
)

ALL_KEPT = "lossless"


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
