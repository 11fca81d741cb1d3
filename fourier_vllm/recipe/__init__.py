"""Recipes: the bits that every K and V dim of a model gets. Needs neither torch nor vLLM."""

from fourier_vllm._json import RecipeError
from fourier_vllm.recipe.bundled import find_bundled
from fourier_vllm.recipe.schema import (
    DEFAULT_LOCAL_WINDOW,
    DEFAULT_PAGE_SIZE,
    DEFAULT_SINK_TOKENS,
    FORMAT,
    PAGE_SIZES,
    LayerRecipe,
    ModelFingerprint,
    Provenance,
    Recipe,
)
from fourier_vllm.recipe.targets import (
    MEASURED_TARGET,
    PREDICTED_TARGET,
    TARGETS,
    Target,
    paper_counts,
    paper_pyramid,
    target_recipe,
)

__all__ = [
    "DEFAULT_LOCAL_WINDOW",
    "DEFAULT_PAGE_SIZE",
    "DEFAULT_SINK_TOKENS",
    "FORMAT",
    "MEASURED_TARGET",
    "PAGE_SIZES",
    "PREDICTED_TARGET",
    "TARGETS",
    "LayerRecipe",
    "ModelFingerprint",
    "Provenance",
    "Recipe",
    "RecipeError",
    "Target",
    "find_bundled",
    "paper_counts",
    "paper_pyramid",
    "target_recipe",
]
