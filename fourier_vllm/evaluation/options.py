"""What `fourier-vllm eval` was asked for, and what of it can be refused before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from fourier_vllm._text import nearest, show
from fourier_vllm.evaluation.tasks import TASKS
from fourier_vllm.evaluation.tasks.haystack import MAX_NEEDLES

CHUNK = 2048  # tokens, vLLM's own default where it does not know the GPU


@dataclass(frozen=True)
class Options:
    """The command's options.

    Attributes
    ----------
    compare : sequence of str or None
        None compares with everything that can be run.
    engine : bool
        Through vLLM instead of `transformers`.
    chunk : int or None
        Tokens the engine prefills at once; None takes `CHUNK`.
    """

    model: str
    recipes: Sequence[Path] = ()
    targets: Sequence[str] = ()
    tasks: Sequence[str] = tuple(TASKS)
    compare: Sequence[str] | None = None
    context: int = 7168
    documents: int = 8
    questions: int = 8
    repeats: int = 1
    text: Sequence[Path] = ()
    out: Path = field(default_factory=lambda: Path("eval"))
    device: str | None = None
    seed: int = 0
    engine: bool = False
    chunk: int | None = None


def check(options: Options) -> None:
    """Refuse before a model is loaded.

    Raises
    ------
    ValueError
        An option is out of range, names something unknown or does not go with another one, or the
        folder cannot be written.
    """
    for name in options.tasks:
        if name not in TASKS:
            raise ValueError(f"--tasks has {show(name)}, which is unknown: {nearest(name, TASKS)}.")
    for option, value, highest in (
        ("--documents", options.documents, 1 << 20),
        ("--questions", options.questions, MAX_NEEDLES),
        ("--repeats", options.repeats, 1 << 10),
        ("--context", options.context, 1 << 24),
        ("--chunk", CHUNK if options.chunk is None else options.chunk, 1 << 24),
    ):
        if not 1 <= value <= highest:
            raise ValueError(f"{option} must be 1 to {highest}, found {value}: choose another one.")
    if options.engine:
        _check_engine(options)
    elif options.chunk is not None:
        raise ValueError("--chunk is an option of the engine: add --engine or leave it out.")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--out {show(options.out, 120)} cannot be made ({error.strerror}): give a folder that"
            " can be written."
        ) from None


def _check_engine(options: Options) -> None:
    others = [name for name in options.compare or () if name not in ("exact", "none")]
    if others:
        raise ValueError(
            f"--compare has {show(others[0])}, and --engine runs stock attention and recipes only:"
            " leave one of the two out."
        )
    if options.device is not None:
        raise ValueError(
            "--device has no effect on --engine, which runs where vLLM does: leave it out."
        )
    if find_spec("vllm") is None:
        raise ValueError("--engine needs vLLM, which is not installed: install it or leave it out.")
