"""Arguments of `fourier-vllm recipes`, and what it does with the recipes that engines measured."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fourier_vllm.recipe.schema import Recipe

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

HEADER = ("file", "target", "model", "ratio", "source", "date")


def add_recipes(commands: Commands) -> None:
    """Add `recipes`."""
    text = "list, show, remove or copy the recipes that engines measured"
    parser = commands.add_parser("recipes", help=text, description=text)
    parser.set_defaults(run=_list)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", help="default: list")

    text = "list the files: target, model, how many times smaller pages are, source, date"
    actions.add_parser("list", help=text, description=text)

    text = "show a recipe as `fourier-vllm inspect` does"
    show = actions.add_parser("show", help=text, description=text)
    _add_name(show)
    show.set_defaults(run=_show)

    text = "remove recipes; the next start measures the model again"
    remove = actions.add_parser("remove", help=text, description=text)
    remove.add_argument("names", nargs="*", metavar="NAME", help="file, or the first part of it")
    remove.add_argument("--all", action="store_true", help="remove every recipe in the folder")
    remove.set_defaults(run=_remove)

    text = "copy a recipe to a file for the option `recipe`"
    export = actions.add_parser("export", help=text, description=text)
    _add_name(export)
    export.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="where the copy goes"
    )
    export.add_argument("--force", action="store_true", help="replace FILE where it exists")
    export.set_defaults(run=_export)


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="file, or the first part of it")


def _list(args: argparse.Namespace) -> int:
    from fourier_vllm.recipe import kept

    files = kept.files()
    if files:
        rows = [HEADER, *map(_row, files)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join(cells).rstrip())
    print(f"{len(files) or 'no'} {'recipe' if len(files) == 1 else 'recipes'} in {kept.folder()}")
    return 0


def _row(file: Path) -> tuple[str, ...]:
    from fourier_vllm.recipe import Recipe, RecipeError
    from fourier_vllm.recipe.describe import ratio_of

    try:
        recipe = Recipe.load(file)
    except RecipeError:
        return (file.name, "damaged", "", "", "", "")
    origin = recipe.provenance
    model = origin.model or recipe.model.architecture
    ratio = f"{ratio_of(recipe):.2f}"
    return (file.name, recipe.name, model, ratio, origin.source, origin.date or "")


def _show(args: argparse.Namespace) -> int:
    from fourier_vllm.recipe.describe import describe

    print(describe(_load(args.name)))
    return 0


def _remove(args: argparse.Namespace) -> int:
    from fourier_vllm.recipe import kept

    if bool(args.names) == args.all:
        raise ValueError("remove takes names or --all: give one of them.")
    # All names before the first file: a wrong one removes nothing.
    for file in kept.files() if args.all else dict.fromkeys(map(kept.find, args.names)):
        try:
            file.unlink(missing_ok=True)
            kept.lock_of(file).unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(
                f"{file} cannot be removed ({error.strerror}): make its folder writable."
            ) from None
        print(f"removed {file}")
    return 0


def _export(args: argparse.Namespace) -> int:
    recipe, output = _load(args.name), Path(os.path.expanduser(args.output))
    if output.exists() and not args.force:
        raise ValueError(f"{output} exists: give another file, or --force to replace it.")
    recipe.save(output)
    print(output)
    return 0


def _load(name: str) -> Recipe:
    from fourier_vllm.recipe import Recipe, RecipeError, kept

    file = kept.find(name)
    try:
        return Recipe.load(file)
    except RecipeError as error:
        raise ValueError(
            f"{file.name} is damaged: remove it with `fourier-vllm recipes remove {file.name}`, and the"
            " next start measures the model again."
        ) from error
