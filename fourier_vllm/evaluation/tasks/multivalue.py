"""`multivalue`: one word with four numbers in four places, all of which must be named."""

from __future__ import annotations

from fourier_vllm.evaluation.needles import WORDS
from fourier_vllm.evaluation.tasks.base import Probe, Source
from fourier_vllm.evaluation.tasks.haystack import Question, hide, names_all

VALUES = 4


def multivalue(source: Source) -> tuple[list[int], list[Probe]]:
    """One question; right where every number is named."""
    rng = source.rng()
    word = rng.choice(WORDS)
    numbers = [str(rng.randint(1_000_000, 9_999_999)) for _ in range(VALUES)]
    context = hide(
        source, [f"One of the special magic numbers for {word} is: {n}." for n in numbers]
    )
    question = Question.make(
        source,
        f"\n\nQuestion: what are all the special magic numbers for {word} mentioned in the text"
        f" above?\nAnswer: The {VALUES} special magic numbers for {word} mentioned in the text above"
        " are: ",
        f"{', '.join(numbers[:-1])} and {numbers[-1]}",
        names_all(numbers),
    )
    return context, [question]
