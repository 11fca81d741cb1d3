"""Where measured recipes are kept: one file each, named by everything that it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fourier_vllm.files import locked
from fourier_vllm.recipe import Recipe, RecipeError
from fourier_vllm.recipe.kept import lock_of

SAMPLED = 256  # numbers of a tensor
# Numbers are read as they are stored; not all dtypes can be indexed.
AS_STORED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Kept(NamedTuple):
    """A recipe, and the file that holds it, or None where none could be written."""

    recipe: Recipe
    file: Path | None
    is_new: bool


def digest_of(module: torch.nn.Module) -> str:
    """Tells the weights of one worker from others: names, shapes, dtypes and some numbers of every tensor."""
    digest = hashlib.sha256()
    for name, tensor in module.named_parameters():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        count = min(SAMPLED, tensor.numel())
        if count:
            # Kernels keep some weights transposed: a flat view would copy these.
            places = torch.arange(count, device=tensor.device) * (tensor.numel() // count)
            stored = tensor.detach().view(AS_STORED[tensor.element_size()])
            some = stored[torch.unravel_index(places, tensor.shape)] if tensor.dim() else stored
            digest.update(some.cpu().numpy().tobytes())
    return digest.hexdigest()


def file_name(model: str, target: str, parts: list[Any]) -> str:
    """Name of the file for a model, a target and all that the recipe depends on besides."""
    digest = hashlib.sha256(json.dumps([model, target, *parts]).encode()).hexdigest()[:16]
    return f"{model.split('/')[-1].lower()}-{target}-{digest}.json"


def digest_of_file(file: Path) -> str | None:
    """Of a text's bytes; None where it cannot be read, which is refused when it is."""
    try:
        return hashlib.sha256(file.expanduser().read_bytes()).hexdigest()
    except OSError:
        return None


def find(file: Path, fits: Callable[[Recipe], bool]) -> Recipe | None:
    """The recipe in a file, or None where there is none that can be read and that fits."""
    try:
        recipe = Recipe.load(file) if file.is_file() else None
    except (RecipeError, OSError):
        return None
    return recipe if recipe is not None and fits(recipe) else None


def find_or_make(file: Path, fits: Callable[[Recipe], bool], make: Callable[[], Recipe]) -> Kept:
    """The recipe in `file`; where it is missing, damaged or another's, what `make` gives, and keep that.

    Of processes that ask at once, on one machine or a shared folder, one makes it and the others wait.
    """
    if (found := find(file, fits)) is not None:
        return Kept(found, file, False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = locked(lock_of(file))
        lock.__enter__()
    except OSError:  # a folder that cannot be written
        return Kept(make(), None, True)
    try:
        if (found := find(file, fits)) is not None:
            return Kept(found, file, False)
        recipe = make()
        try:
            recipe.save(file)
        except (RecipeError, OSError):
            return Kept(recipe, None, True)
        return Kept(recipe, file, True)
    finally:
        lock.__exit__(None, None, None)
