"""`nll`: the next 512 tokens, their NLL and the KL divergence from exact attention, in nats a token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fourier_vllm.evaluation.session import Session
from fourier_vllm.evaluation.tasks.base import Metrics, Probe, Source, plain_context

SCORED_TOKENS = 512


@dataclass
class Continuation:
    """What follows a context."""

    ids: list[int]
    exact: Tensor | None = None  # [t, V], log-probabilities

    def measure(self, session: Session) -> list[Metrics]:
        found = []
        target = torch.tensor(self.ids[1:], device=session.model.device)
        for logp in session.log_probs(self.ids[:1], self.ids[1:]):
            if self.exact is None:
                self.exact = logp
            kl = (self.exact.exp() * (self.exact - logp)).sum(-1)
            nll = -logp.gather(1, target[:, None])
            found.append({"nll": float(nll.mean()), "kl": float(kl.mean())})
        return found


def nll(source: Source) -> tuple[list[int], list[Probe]]:
    """Predictions of the document's next tokens."""
    # The first of them is only fed: the context's own last token is inside the cache.
    context, ids = plain_context(source, SCORED_TOKENS + 1)
    return context, [Continuation(ids)]
