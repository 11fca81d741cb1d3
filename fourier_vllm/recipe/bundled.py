"""Recipes that are shipped with the package."""

from __future__ import annotations

import importlib.resources
import logging

from fourier_vllm._json import RecipeError
from fourier_vllm._text import show
from fourier_vllm.recipe.schema import ModelFingerprint, Recipe

logger = logging.getLogger(__name__)


def find_bundled(fingerprint: ModelFingerprint, target: str) -> Recipe | None:
    """The recipe shipped for this model and target, or None.

    A shipped recipe serves the target it is named after; the first by file name wins.
    """
    try:
        files = list(importlib.resources.files("fourier_vllm.recipes").iterdir())
    except (ModuleNotFoundError, FileNotFoundError):
        return None
    for file in sorted(files, key=lambda file: file.name):
        if not file.name.endswith(".json"):
            continue
        try:
            recipe = Recipe.loads(file.read_bytes(), f"recipe {show(file.name)}")
            if recipe.name != target:
                continue
            recipe.check_fits(fingerprint)
        except RecipeError as error:
            logger.debug("passed over: %s", error)
            continue
        return recipe
    return None
