"""The folder of the recipes that engines measured."""

from __future__ import annotations

from pathlib import Path

from fourier_vllm._text import nearest, show
from fourier_vllm.files import cache_dir


def folder() -> Path:
    """Of the recipes that engines measured."""
    return cache_dir() / "recipes"


def lock_of(file: Path) -> Path:
    """The file that is locked while a recipe is made."""
    return file.with_suffix(".lock")


def files() -> list[Path]:
    """Files of recipes in the folder, by name, damaged ones too.

    Raises
    ------
    ValueError
        The folder cannot be read.
    """
    try:
        return sorted(x for x in folder().iterdir() if x.suffix == ".json" and x.is_file())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ValueError(
            f"{folder()} cannot be read ({error.strerror}): set FOURIER_CACHE to a readable folder."
        ) from None


def find(name: str) -> Path:
    """The file of a name: its own, with or without .json, or the first part of it and of no other.

    Raises
    ------
    ValueError
        No file has the name, or several begin with it.
    """
    names = {file.name: file for file in files()}
    if not names:
        raise ValueError(
            f"{folder()} has no recipe, found the name {show(name)}: start an engine with the option"
            ' "recipe": "measured" first.'
        )
    for exact in (name, f"{name}.json"):
        if exact in names:
            return names[exact]
    found = [other for other in names if name and other.startswith(name)]
    if not found:
        raise ValueError(f"no recipe is called {show(name)}: {nearest(name, names)}.")
    if len(found) > 1:
        raise ValueError(f"{show(name)} begins the names {', '.join(found)}: write more of one.")
    return names[found[0]]
