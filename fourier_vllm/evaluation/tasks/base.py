"""What a task is: a context made from a document, and probes that are put to it afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

Metrics = dict[str, float]


@dataclass(frozen=True)
class Source:
    """What a task may use.

    Attributes
    ----------
    document : str
        Text, longer than the context.
    encode, decode : callable
        Text to token ids, without special tokens, and back.
    first : list of int
        Tokens that a text of this model starts with: its beginning-of-text token, if it has one.
    context : int
        Tokens of the context.
    middle : tuple of int
        First token that is compressed, and first that is not any more.
    questions : int
        Questions a context, where a task can ask several.
    seed : str
        Different for every document and task.
    """

    document: str
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    first: list[int]
    context: int
    middle: tuple[int, int]
    questions: int
    seed: str

    def rng(self) -> random.Random:
        """The same numbers every time."""
        return random.Random(self.seed)


class Scores(NamedTuple):
    """Log-probabilities of a target behind a context.

    Attributes
    ----------
    target : Tensor [t], float32
        Of the target's own tokens.
    vocabulary : Tensor [t, V], float32, or None
        Of every token at the same places; None where only the target's own are known.
    """

    target: Tensor
    vocabulary: Tensor | None


class Session(Protocol):
    """Questions to one context, held in one or several formats; none leaves a trace for the next."""

    def score(self, prompt: Sequence[int], target: Sequence[int]) -> Iterator[Scores]:
        """Score `target` behind the context and `prompt`, at least one token each, in each format."""
        ...

    def generate(self, prompt: Sequence[int], count: int) -> list[list[int]]:
        """`count` greedy tokens behind the context and `prompt`, in each format."""
        ...


class Probe(Protocol):
    """One question about a context.

    A probe meets the formats in sessions, the first of which begins with exact; it may keep what
    exact answered.
    """

    def measure(self, session: Session) -> list[Metrics]:
        """Metrics of each format of the session."""
        ...


# Context and probes; tasks that make the same context share its prefill.
Task = Callable[[Source], tuple[list[int], list[Probe]]]


def plain_context(source: Source, after: int) -> tuple[list[int], list[int]]:
    """The document's beginning, and `after` tokens that follow it.

    Raises
    ------
    ValueError
        The document is too short.
    """
    need = source.context + after
    ids = [*source.first, *source.encode(source.document)][:need]
    if len(ids) < need:
        raise ValueError(
            f"a document has {len(ids)} tokens and {need} are needed: give longer files to --text,"
            " or a smaller --context."
        )
    return ids[: source.context], ids[source.context :]
