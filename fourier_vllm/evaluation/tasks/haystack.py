"""Sentences hidden in a document, and questions about them, in the manner of NVIDIA's RULER.

The questions come behind the context, so that whatever holds the context cannot know what will be
asked. Every needle lies in the part that is compressed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fourier_vllm.evaluation.needles import WORDS
from fourier_vllm.evaluation.tasks.base import Metrics, Session, Source

BREAK = re.compile(r"\n|(?<=[.!?]) ")  # where a sentence may be put between two others
MARGIN = 0.01  # of the middle, at both ends
MAX_NEEDLES = len(WORDS)
EXTRA_TOKENS = 8  # generated beyond the answer's own, for another spelling of it


def hide(source: Source, sentences: Sequence[str]) -> list[int]:
    """A context with the sentences, in order, spread over the part that is compressed.

    Raises
    ------
    ValueError
        The document is too short, has no room between its lines, or the sentences take too much.
    """
    rng, encode = source.rng(), source.encode
    sizes = [len(encode(f"{sentence}\n")) + 1 for sentence in sentences]
    room = source.context - len(source.first) - sum(sizes)
    ids = encode(source.document)
    if len(ids) < room or room < source.context // 2:
        raise ValueError(
            f"a document of {len(ids)} tokens cannot hold {len(sentences)} needles in a context of"
            f" {source.context}: give longer files to --text, fewer --questions or another"
            " --context."
        )
    body = source.decode(ids[:room])
    breaks = [found.end() for found in BREAK.finditer(body)]
    # Tokens before each break, but for tokens that would span one.
    pieces = (body[start:end] for start, end in itertools.pairwise([0, *breaks]))
    tokens = list(itertools.accumulate(len(encode(piece)) for piece in pieces))
    low, high = source.middle
    margin = round(MARGIN * (high - low))
    step = (high - low - 2 * margin) / len(sentences)
    places, before = [], len(source.first)
    for i, size in enumerate(sizes):
        # A stratum each: needles at every depth, whatever the seed.
        start = low + margin + i * step
        inside = [
            place
            for place, n in zip(breaks, tokens, strict=True)
            if start <= n + before <= start + step - size
        ]
        if not inside:
            raise ValueError(
                "a document has no line or sentence end where a needle should go: give other files"
                " to --text, fewer --questions or a larger --context."
            )
        places.append(rng.choice(inside))
        before += size
    for place, sentence in reversed(list(zip(places, sentences, strict=True))):
        body = body[:place] + sentence + body[place - 1] + body[place:]
    context = [*source.first, *encode(body)][: source.context]
    middle = source.decode(context[low:high])
    if not all(sentence in middle for sentence in sentences):
        raise ValueError(
            "a needle did not fall into the compressed part of the context: choose a larger"
            " --context or another --seed."
        )
    return context


@dataclass
class Question:
    """A question behind the context and the answer that must be generated.

    Attributes
    ----------
    answer : str
        The right continuation; its mean log-probability a token is the smooth metric.
    share : callable
        Share of the answer, 0 to 1, that a generated text gives; all of it is right.
    """

    prompt: list[int]
    target: list[int]
    answer: str
    decode: Callable[[list[int]], str]
    share: Callable[[str], float]

    @classmethod
    def make(
        cls, source: Source, prompt: str, answer: str, share: Callable[[str], float]
    ) -> Question:
        ids, whole = source.encode(prompt), source.encode(prompt + answer)
        # Some tokenizers join the first character of the answer with the prompt's last.
        target = whole[len(ids) :] if whole[: len(ids)] == ids else source.encode(answer)
        return cls(ids, target, answer, source.decode, share)

    def measure(self, session: Session) -> list[Metrics]:
        logps = [float(scores.target.mean()) for scores in session.score(self.prompt, self.target)]
        texts = session.generate(self.prompt, len(self.target) + EXTRA_TOKENS)
        shares = [self.share(self.decode(text)) for text in texts]
        return [
            {"right": float(share == 1), "share": share, "logp": logp}
            for share, logp in zip(shares, logps, strict=True)
        ]


def names_all(answers: Sequence[str]) -> Callable[[str], float]:
    """Share of the answers that occur in a text, as RULER counts."""

    def share(text: str) -> float:
        return sum(answer in text for answer in answers) / len(answers)

    return share
