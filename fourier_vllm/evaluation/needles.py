"""Needles: sentences with seven-digit numbers hidden in a long document, asked for afterwards.

After NVIDIA's RULER (multi-key needles). The questions come behind the context, so that whatever holds
the context cannot know what will be asked.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

WORDS = [
    "apple",
    "river",
    "castle",
    "violin",
    "planet",
    "garden",
    "pepper",
    "silver",
    "falcon",
    "marble",
    "bridge",
    "candle",
    "forest",
    "pirate",
    "rocket",
    "saddle",
    "tunnel",
    "walnut",
    "zebra",
    "anchor",
    "basket",
    "copper",
    "dragon",
    "engine",
]


@dataclass(frozen=True)
class Question:
    """A prompt of token ids and the digits it should be continued with."""

    ids: list[int]
    answer: str


def needle_questions(
    documents: list[str],
    encode: Callable[[str], list[int]],
    context_tokens: int,
    needles: int = 4,
    seed: int = 0,
) -> list[list[Question]]:
    """Contexts with `needles` questions each, one context a document.

    Parameters
    ----------
    documents : list of str
        Each longer than `context_tokens` tokens.
    encode : callable
        Text to token ids, without special tokens.
    context_tokens : int
        Tokens of the context; the question adds about 50.

    Returns
    -------
    list of list of Question
        Questions of one context share its tokens as a prefix.
    """
    rng = random.Random(seed)
    contexts = []
    for document in documents:
        words = rng.sample(WORDS, needles)
        numbers = [str(rng.randint(1_000_000, 9_999_999)) for _ in words]
        # Cut at the wanted length with room for the needles, then hide them between lines.
        share = (context_tokens - 40 * needles) / len(encode(document))
        lines = document[: int(len(document) * share)].split("\n")
        places = sorted(rng.sample(range(len(lines) // 40, len(lines) - 1), needles), reverse=True)
        for place, word, number in zip(places, words, numbers, strict=True):
            lines.insert(place, f"One of the special magic numbers for {word} is: {number}.")
        context = encode("\n".join(lines))[:context_tokens]
        contexts.append(
            [
                Question(
                    context
                    + encode(
                        f"\n\nQuestion: what is the special magic number for {word} mentioned in "
                        f"the text above?\nAnswer: One of the special magic numbers for {word} is: "
                    ),
                    number,
                )
                for word, number in zip(words, numbers, strict=True)
            ]
        )
    return contexts


def is_correct(text: str, answer: str) -> bool:
    """Whether the first number in a continuation is the answer."""
    return text.strip().replace(",", "").startswith(answer)
