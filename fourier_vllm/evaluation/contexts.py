"""Contexts of an evaluation: documents, and what the tasks make of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from fourier_vllm.calibration.text import read_text
from fourier_vllm.evaluation.choose import Span
from fourier_vllm.evaluation.tasks import TASKS
from fourier_vllm.evaluation.tasks.base import Probe, Source
from fourier_vllm.evaluation.text import documents

BEHIND_TOKENS = 640  # of a question and its answer, or of a continuation, at most
PLAIN = {"nll", "agreement"}
ONE_QUESTION = {"needle", "multivalue", "vartrack"}
CHARS_A_TOKEN = 6  # of the manuals; SmolLM2 has 4 on average


class Wanted(Protocol):
    """The options that matter here."""

    @property
    def tasks(self) -> Sequence[str]: ...
    @property
    def context(self) -> int: ...
    @property
    def documents(self) -> int: ...
    @property
    def questions(self) -> int: ...
    @property
    def repeats(self) -> int: ...
    @property
    def text(self) -> Sequence[Path]: ...
    @property
    def seed(self) -> int: ...


def contexts(
    options: Wanted, text: str, number: int, tokenizer: Any, first: list[int], span: Span
) -> Iterator[tuple[list[int], list[tuple[str, Probe]]]]:
    """Contexts of one document with the probes of all tasks that use them."""

    def encode(string: str) -> list[int]:
        return tokenizer(string, add_special_tokens=False, verbose=False).input_ids

    found: dict[tuple[int, ...], list[tuple[str, Probe]]] = {}
    for task, repeat in wanted(options):
        source = Source(
            document=text,
            encode=encode,
            decode=tokenizer.decode,
            first=first,
            context=options.context,
            middle=(span.start, span.end),
            questions=options.questions,
            seed=f"{options.seed} {task} {number}" + f" {repeat}" * bool(repeat),
        )
        ids, probes = TASKS[task](source)
        found.setdefault(tuple(ids), []).extend((task, probe) for probe in probes)
    for key, list_of in found.items():
        yield list(key), list_of


def wanted(options: Wanted) -> list[tuple[str, int]]:
    """Tasks, those of one question a context as often as `repeats` says."""
    return [
        (task, repeat)
        for task in options.tasks
        for repeat in range(options.repeats if task in ONE_QUESTION else 1)
    ]


def prefills(options: Wanted) -> int:
    """Contexts of a document: tasks on the plain text share one."""
    hidden = [pair for pair in wanted(options) if pair[0] not in PLAIN]
    return len(set(hidden)) + bool(PLAIN & set(options.tasks))


def read_documents(options: Wanted) -> list[str]:
    """Texts of the user's files, or manuals.

    Raises
    ------
    ValueError
        There are too few, or one cannot be read.
    """
    if not options.text:
        return documents(options.documents, CHARS_A_TOKEN * (options.context + BEHIND_TOKENS))
    if len(options.text) < options.documents:
        raise ValueError(
            f"--text has {len(options.text)} files for --documents {options.documents}: give as many"
            " files as documents."
        )
    return [read_text(file)[1] for file in options.text[: options.documents]]
