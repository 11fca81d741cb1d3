"""`nll`: the next 512 tokens, their NLL and the KL divergence from exact attention, in nats a token.

There is no KL where a session does not tell the probabilities of the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fourier_vllm.evaluation.tasks.base import Metrics, Probe, Session, Source, plain_context

SCORED_TOKENS = 512


@dataclass
class Continuation:
    """What follows a context."""

    ids: list[int]
    exact: Tensor | None = None  # [t, V], log-probabilities

    def measure(self, session: Session) -> list[Metrics]:
        found = []
        for target, logp in session.score(self.ids[:1], self.ids[1:]):
            metrics = {"nll": -float(target.mean())}
            if logp is not None:
                if self.exact is None:
                    self.exact = logp
                kl = (self.exact.exp() * (self.exact - logp)).sum(-1)
                metrics["kl"] = float(kl.mean())
            found.append(metrics)
        return found


def nll(source: Source) -> tuple[list[int], list[Probe]]:
    """Predictions of the document's next tokens."""
    # The first of them is only fed: the context's own last token is inside the cache.
    context, ids = plain_context(source, SCORED_TOKENS + 1)
    return context, [Continuation(ids)]
