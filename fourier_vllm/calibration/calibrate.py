"""`fourier-vllm calibrate`: a model and a text go in, a recipe with its measured cost comes out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from fourier_vllm._json import RecipeError
from fourier_vllm._text import show
from fourier_vllm.calibration import own_text
from fourier_vllm.calibration.allocate_model import Pages, check_budget, spend
from fourier_vllm.calibration.collect import collect
from fourier_vllm.calibration.dataset import DEFAULT_COLUMN, find_dataset, read_dataset
from fourier_vllm.calibration.hf_model import (
    digest_of,
    fingerprint_of,
    load,
    max_tokens,
    model_name,
)
from fourier_vllm.calibration.predict import weight_recipe
from fourier_vllm.calibration.progress import Progress
from fourier_vllm.calibration.statistics import LayerStatistics
from fourier_vllm.calibration.text import DOCUMENT_TOKENS, MAX_BYTES, cut, read_text
from fourier_vllm.recipe import (
    DEFAULT_LOCAL_WINDOW,
    DEFAULT_PAGE_SIZE,
    DEFAULT_SINK_TOKENS,
    FORMAT,
    TARGETS,
    ModelFingerprint,
    Provenance,
    Recipe,
)
from fourier_vllm.recipe.describe import ratio_of

CHARS_A_TOKEN = 8  # read from a dataset; most tokenizers and languages need half of it


@dataclass(frozen=True)
class Options:
    """What `fourier-vllm calibrate` was asked for."""

    model: str
    text: Path | None = None
    text_column: str | None = None
    own_text: bool = False
    target: str = "balanced"
    bits: float | None = None
    page_size: int = DEFAULT_PAGE_SIZE
    local_window: int = DEFAULT_LOCAL_WINDOW
    sink_tokens: int = DEFAULT_SINK_TOKENS
    tokens: int = 4 * DOCUMENT_TOKENS
    tensor_parallel_size: int = 1
    check: bool = True
    output: Path | None = None


def run(options: Options) -> int:
    """Calibrate and write the recipe; returns the exit code."""
    name = model_name(options.model)
    output = options.output or Path(f"{name.split('/')[-1].lower()}-{recipe_name(options)}.json")
    check(options)
    check_output(output)  # minutes before it is written
    progress = output.expanduser().with_name(output.name + ".progress.npz")
    recipe = calibrate(options, progress)
    recipe.save(output)
    for kept in (progress, text_file(progress)):
        kept.unlink(missing_ok=True)
    kl, nll = recipe.provenance.kl, recipe.provenance.nll
    cost = "" if kl is None or nll is None else f", KL {kl:.4f} and NLL {nll:+.4f} nats a token"
    print(f"{output}: {ratio_of(recipe):.2f} times smaller{cost}")
    return 0


def calibrate(options: Options, progress: Path) -> Recipe:
    """Measure a model on a text and spend the target's bytes.

    Parameters
    ----------
    progress : Path
        File that keeps what was measured so far; an interrupted run goes on from it.

    Raises
    ------
    ValueError
        Model, text or target cannot be used; a RecipeError where it is the target.
    """
    text = None if options.own_text else text_of(options)
    model, tokenizer = load(options.model)
    fingerprint, aim = fingerprint_of(model), TARGETS[options.target]
    ratio = ratio_asked(options)
    if ratio is not None:
        shape = (fingerprint.num_kv_heads, fingerprint.head_size, options.page_size)
        pages = Pages(*shape, aim.coefficients(options.page_size), aim.coefficient_bits)
        check_budget(pages, ratio, shards(options, fingerprint))
    identity = (model_name(options.model), digest_of(model))
    if text is None:
        documents = own_documents(options, model, tokenizer, identity, text_file(progress))
    else:
        longest = min(DOCUMENT_TOKENS, max_tokens(model))
        documents = cut(tokenizer, text[1], options.tokens, options.page_size, longest)
    sizes = (
        options.page_size,
        aim.coefficients(options.page_size),
        options.sink_tokens,
        options.local_window,
    )
    kept = Progress.resume(progress, *identity, sizes, documents=documents)
    if kept.num_done:
        print(f"going on from {progress}: {kept.num_done} of {len(documents)} documents done")
    statistics = collect(
        model,
        documents,
        *sizes,
        done=kept.sums,
        num_done=kept.num_done,
        checkpoint=kept.save,
    )
    provenance = Provenance(
        source="calibrated",
        text=own_text.NAME if text is None else text[0],
        tokens=sum(map(len, documents)),
        date=datetime.now(timezone.utc).date().isoformat(),
        tool=tool_version(),
        model=model_name(options.model),
    )
    recipe = measured_recipe(fingerprint, statistics, options, provenance)
    if not options.check:
        return recipe
    from fourier_vllm.evaluation.held_out import held_out

    exact, (loss,) = held_out(model, tokenizer, [recipe])
    measured = {"kl": round(loss.kl, 5), "nll": round(loss.nll - exact, 5)}
    return recipe.model_copy(update={"provenance": provenance.model_copy(update=measured)})


def text_of(options: Options) -> tuple[str, str]:
    """Name and content of the calibration text.

    Raises
    ------
    ValueError
        It cannot be read.
    """
    dataset = None if options.text is None else find_dataset(options.text)
    if dataset is not None:
        chars = min(CHARS_A_TOKEN * options.tokens, MAX_BYTES)
        return dataset.name, read_dataset(dataset, options.text_column or DEFAULT_COLUMN, chars)
    if options.text_column is not None:
        raise ValueError("--text-column is for datasets: leave it out, or give one as --text.")
    return read_text(options.text)


def own_documents(
    options: Options, model: Any, tokenizer: Any, identity: tuple[str, str], kept: Path
) -> list[Tensor]:
    """Text that the model writes, or what it wrote before an interruption into `kept`."""
    longest = min(own_text.OWN_DOCUMENT_TOKENS, max_tokens(model))
    sizes = (options.tokens, options.page_size, longest)
    return own_text.write_once(
        kept, *identity, sizes, write=lambda: own_text.write(model, tokenizer, *sizes)
    )


def text_file(progress: Path) -> Path:
    """Where the model's own text is kept, beside the sums over it."""
    return progress.with_suffix(".text.npz")


def measured_recipe(
    fingerprint: ModelFingerprint,
    statistics: Sequence[LayerStatistics],
    options: Options,
    provenance: Provenance,
) -> Recipe:
    """The recipe of a target from measured statistics, one per layer.

    Raises
    ------
    RecipeError
        The statistics are of another shape than the model, or the target cannot be met.
    """
    sizes = (options.page_size, options.local_window, options.sink_tokens)
    aim = TARGETS[options.target]
    ratio = ratio_asked(options)
    if ratio is None:
        # The paper looks at how well a key is rebuilt, not at who reads it.
        return weight_recipe(
            fingerprint,
            options.target,
            [x.residual for x in statistics],
            *sizes,
            value_statistics=[x.value_residual for x in statistics],
            provenance=provenance,
        )
    coefficients = aim.coefficients(options.page_size)
    data = {
        "format": FORMAT,
        "name": recipe_name(options),
        "model": fingerprint,
        "page_size": options.page_size,
        "sink_tokens": options.sink_tokens,
        "local_window": options.local_window,
        "coefficients": coefficients,
        "coefficient_bits": aim.coefficient_bits,
        "layers": spend(
            statistics,
            ratio,
            options.page_size,
            coefficients,
            aim.coefficient_bits,
            shards(options, fingerprint),
        ),
        "provenance": provenance,
    }
    return Recipe.from_dict(data, f"target {options.target}")


def ratio_asked(options: Options) -> float | None:
    """Times that pages shall be smaller than raw ones; None where no budget rules."""
    return TARGETS[options.target].ratio if options.bits is None else 16 / options.bits


def recipe_name(options: Options) -> str:
    """The target that the recipe serves, or its bits."""
    return options.target if options.bits is None else f"{options.bits:g}-bits"


def shards(options: Options, fingerprint: ModelFingerprint) -> int:
    """Groups of heads with equal bytes: ranks beyond the KV heads share them."""
    return min(options.tensor_parallel_size, fingerprint.num_kv_heads)


def check(options: Options) -> None:
    """Refuse before a model is loaded; raises ValueError naming the option."""
    if options.bits is not None and not 0 < options.bits <= 16:  # NaN neither
        raise ValueError(
            f"--bits must be above 0 and at most 16, found {options.bits:g}: choose about 3."
        )
    for name, found, least, most in (
        ("--tokens", options.tokens, 1, None),
        ("--tensor-parallel-size", options.tensor_parallel_size, 1, None),
        ("--local-window", options.local_window, 16, 65536),
        ("--sink-tokens", options.sink_tokens, 0, options.page_size),
    ):
        if found < least or (most is not None and found > most):
            rule = f"at least {least}" if most is None else f"from {least} to {most}"
            raise ValueError(f"{name} must be {rule}, found {found}: leave it out for the default.")


def check_output(path: Path) -> None:
    """Raise RecipeError where a recipe could not be written later."""
    file = path.expanduser()
    folder = file.parent
    if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise RecipeError(
            f"recipe {show(path, 120)} cannot be written: give a file in an existing, writable"
            " folder."
        )


def tool_version() -> str:
    """Name and version of this package, for provenance."""
    try:
        return f"fourier-vllm {version('fourier-vllm')}"
    except PackageNotFoundError:
        return "fourier-vllm from source"
