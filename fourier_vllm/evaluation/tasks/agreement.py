"""`agreement`: 256 greedy tokens after the document, compared with what exact attention writes."""

from __future__ import annotations

from dataclasses import dataclass

from fourier_vllm.evaluation.tasks.base import Metrics, Probe, Session, Source, plain_context

GENERATED_TOKENS = 256


@dataclass
class Generation:
    """Free generation: after a first difference the texts go their own ways."""

    prompt: list[int]
    exact: list[int] | None = None

    def measure(self, session: Session) -> list[Metrics]:
        found = []
        for ids in session.generate(self.prompt, GENERATED_TOKENS):
            if self.exact is None:
                self.exact = ids
            same = [a == b for a, b in zip(ids, self.exact, strict=True)]
            prefix = same.index(False) if False in same else len(same)
            found.append({"same": sum(same) / len(same), "prefix": float(prefix)})
        return found


def agreement(source: Source) -> tuple[list[int], list[Probe]]:
    """Generation from where the context ends."""
    context, ids = plain_context(source, 1)
    return context, [Generation(ids)]
