"""`multikey`: seven-digit numbers for several words in one context, of which each is asked."""

from __future__ import annotations

from functools import partial

from fourier_vllm.evaluation.needles import WORDS, is_correct
from fourier_vllm.evaluation.tasks.base import Probe, Source
from fourier_vllm.evaluation.tasks.haystack import Question, hide


def multikey(source: Source, keys: int | None = None) -> tuple[list[int], list[Probe]]:
    """A needle a key, and a question about each.

    Parameters
    ----------
    keys : int or None
        None takes the run's questions a context.
    """
    rng = source.rng()
    words = rng.sample(WORDS, keys or source.questions)
    numbers = [str(rng.randint(1_000_000, 9_999_999)) for _ in words]
    prefix = "One of the special magic numbers for {} is: "
    context = hide(
        source,
        [f"{prefix.format(w)}{number}." for w, number in zip(words, numbers, strict=True)],
    )

    def share(answer: str, text: str) -> float:
        return float(is_correct(text, answer))

    return context, [
        Question.make(
            source,
            f"\n\nQuestion: what is the special magic number for {word} mentioned in the text above?"
            f"\nAnswer: {prefix.format(word)}",
            number,
            partial(share, number),
        )
        for word, number in zip(words, numbers, strict=True)
    ]
