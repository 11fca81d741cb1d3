"""Which formats a run compares, and which tokens all of them compress."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from fourier_vllm._text import nearest, show
from fourier_vllm.evaluation.formats import COMPARATORS
from fourier_vllm.evaluation.formats.base import Format
from fourier_vllm.evaluation.formats.fourier import Fourier
from fourier_vllm.recipe import (
    DEFAULT_LOCAL_WINDOW,
    DEFAULT_PAGE_SIZE,
    DEFAULT_SINK_TOKENS,
    ModelFingerprint,
    Recipe,
    find_bundled,
)
from fourier_vllm.window import pages_before

PAPER_PAGES = "paper-pages"  # the shipped recipe `paper`: the paper's split, a window a page
DEFAULT_TARGETS = ("quality", "balanced", "compact")


class Span(NamedTuple):
    """The part of a context that is compressed, the same for every format of a run.

    Attributes
    ----------
    start : int
        First tokens, which stay raw.
    end : int
        The last tokens from here on stay raw.
    page_size, local_window : int
        What `end` follows from, as in the engine (`window.pages_before`).
    """

    start: int
    end: int
    page_size: int
    local_window: int


class Choice(Protocol):
    """The options that matter here."""

    @property
    def recipes(self) -> Sequence[Path]: ...
    @property
    def targets(self) -> Sequence[str]: ...
    @property
    def compare(self) -> Sequence[str] | None: ...


def choose_formats(options: Choice, model: ModelFingerprint) -> list[Format]:
    """Exact, ours, then what they are compared with.

    Without recipes and targets, those are evaluated that are shipped for the model.

    Raises
    ------
    ValueError
        A recipe does not fit the model, a target is not shipped for it, a name is unknown, or two
        formats have the same one.
    """
    ours: list[Format] = []
    for path in options.recipes:
        recipe = Recipe.load(path)
        recipe.check_fits(model)
        ours.append(Fourier(recipe, path.stem))
    for target in options.targets:
        found = find_bundled(model, target)
        if found is None:
            raise ValueError(
                f"no recipe for target {show(target)} and this model is shipped: make one with"
                " `fourier-vllm calibrate` and give it as --recipe."
            )
        ours.append(Fourier(found))
    if not ours:
        shipped = (find_bundled(model, target) for target in DEFAULT_TARGETS)
        ours = [Fourier(recipe) for recipe in shipped if recipe is not None]
    theirs = comparators(options.compare, model)
    if not ours and not theirs:
        raise ValueError(
            "there is nothing to evaluate: no recipe is shipped for this model, make one with"
            " `fourier-vllm calibrate` and give it as --recipe."
        )
    forms: list[Format] = [COMPARATORS["exact"](model), *ours, *theirs]
    names = [form.name for form in forms]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two formats are called {show(name)}: rename a recipe's file.")
    return forms


def comparators(names: Sequence[str] | None, model: ModelFingerprint) -> list[Format]:
    """The formats of `--compare`, in the registry's order; None is all of them."""
    names = ("all",) if names is None else names
    known = [name for name in (*COMPARATORS, PAPER_PAGES) if name != "exact"]
    for name in names:
        if name not in (*known, "exact", "all", "none"):
            raise ValueError(
                f"--compare has {show(name)}, which is unknown: {nearest(name, known)}, all, none."
            )
    if "none" in names:
        return []
    chosen = known if "all" in names else [name for name in known if name in names]
    pages = find_bundled(model, "paper")
    if PAPER_PAGES in names and pages is None:
        raise ValueError(
            f"--compare has {PAPER_PAGES}, and no recipe `paper` is shipped for this model: make one"
            " with `fourier-vllm calibrate --target paper` and give it as --recipe."
        )
    forms = [COMPARATORS[name](model) for name in chosen if name in COMPARATORS]
    if PAPER_PAGES in chosen and pages is not None:
        form = Fourier(pages, PAPER_PAGES)
        form.family = PAPER_PAGES
        # Before the ones that drop tokens: caches of equal length are run together.
        forms.insert(0, form)
    return forms


def span_of(forms: Sequence[Format], context: int) -> Span:
    """Tokens that every format compresses: sinks and window of the most careful recipe.

    Raises
    ------
    ValueError
        The context is too short to have such tokens.
    """
    recipes = [form.recipe for form in forms if isinstance(form, Fourier)]
    W = max((recipe.page_size for recipe in recipes), default=DEFAULT_PAGE_SIZE)
    L = max((recipe.local_window for recipe in recipes), default=DEFAULT_LOCAL_WINDOW)
    S = max((recipe.sink_tokens for recipe in recipes), default=DEFAULT_SINK_TOKENS)
    end = pages_before(context, L, W) * W
    if end <= S or end < W:
        raise ValueError(
            f"--context must be at least {L + W * (S // W + 1)} for {S} first and {L} last raw"
            f" tokens and pages of {W}, found {context}: choose a larger one."
        )
    return Span(S, end, W, L)
