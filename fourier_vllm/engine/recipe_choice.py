"""Which recipe an engine runs: a file's, the model's own, a bundled one, a measured or a predicted one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fourier_vllm.config import MEASURED, WEIGHTS, FourierConfig, Geometry
from fourier_vllm.engine.fingerprint import fingerprint_of
from fourier_vllm.engine.measure.possible import why_not
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
PREDICTED = "predicted from the weights"


@dataclass(frozen=True)
class EngineRecipe:
    """A recipe as resolved for one engine.

    Attributes
    ----------
    recipe : Recipe or None
        None: it is measured once weights are loaded, or each layer derives its bits from them.
    target : str
        Named target, of which bits will be, where `recipe` is None.
    source : str
        Where it came from, for the log.
    is_measured : bool
        Whether the engine measures its model, or has.
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
    is_measured: bool = False

    @property
    def is_predicted(self) -> bool:
        """Whether each layer derives its bits from its weights."""
        return self.recipe is None and not self.is_measured

    @property
    def depends_on_weights(self) -> bool:
        """Whether bits follow from the weights that this engine loads."""
        return self.recipe is None or self.is_measured

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
    """Resolve the engine's recipe: the option, the model's config, a bundled one, a measurement, the weights.

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
    recipe, source = None, PREDICTED
    embedded = getattr(vllm_config.model_config.hf_config, "fourier_attention", None)
    if options.recipe not in (None, MEASURED, WEIGHTS):
        recipe, source = _load(options.recipe), options.recipe
    elif options.recipe is not None or options.calibration_text is not None:
        pass
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
    is_measured = recipe is None and options.recipe != WEIGHTS and why_not(vllm_config) is None
    default = MEASURED_TARGET if is_measured else PREDICTED_TARGET
    if is_measured:
        source = "measured on this model"
    return EngineRecipe(
        fingerprint=fingerprint,
        geometry=options.geometry(recipe),
        recipe=recipe,
        target=recipe.name if recipe else options.target or default,
        prefill=options.prefill,
        source=source,
        fragments=vllm_config.device_config.device_type == "cuda",
        is_measured=is_measured,
    )


# Every layer resolves the recipe; the files are read once a process.
_load = lru_cache(maxsize=8)(Recipe.load)
_find_bundled = lru_cache(maxsize=8)(find_bundled)
