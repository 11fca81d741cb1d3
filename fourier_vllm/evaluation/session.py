"""A Hugging Face model behind one prefilled context, held in several formats at once.

The formats' caches are one batch: a forward pass of a question costs about the same for all of them
as for one. Caches are never changed in place, so every question starts from the same context.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fourier_vllm.evaluation.formats.base import Format
from fourier_vllm.evaluation.tasks.base import Scores


@torch.inference_mode()
def prefill(model: Any, ids: Sequence[int]) -> Any:
    """The exact cache of a context."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    tokens = torch.tensor([ids], device=model.device)
    # Without the head: logits of a whole document would be the largest tensor.
    model.base_model(input_ids=tokens, past_key_values=cache, use_cache=True)
    return cache


def fork(cache: Any) -> Any:
    """A cache that can grow without changing `cache`; tensors are shared."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


@torch.inference_mode()
def hold(
    cache: Any, form: Format, layers: Sequence[int], start: int, end: int
) -> tuple[Any, float]:
    """The cache with tokens `start` to `end` held in a format, and the mean bits per value.

    Parameters
    ----------
    cache : DynamicCache
        Of one context, exact; not changed.
    layers : sequence of int
        Layers with full attention, the ones that are compressed.

    Raises
    ------
    ValueError
        The format gave back values that are not finite.
    """
    other, bits = fork(cache), 0.0
    for ordinal, i in enumerate(layers):
        layer = other.layers[i]
        k, v = layer.keys[0], layer.values[0]
        held = form.hold(k[:, :end], v[:, :end], start, ordinal)
        if not (held.k.isfinite().all() and held.v.isfinite().all()):
            raise ValueError(
                f"format {form.name} gives values that are not finite in layer {i}: leave it out of"
                " --compare, or check the recipe."
            )
        for name, x, middle in (("keys", k, held.k), ("values", v, held.v)):
            whole = torch.cat([x[:, :start], middle.to(x.dtype), x[:, end:]], 1)
            setattr(layer, name, whole[None])
        bits += held.bits / len(layers)
    return other, bits


def stack(caches: Sequence[Any]) -> Any:
    """Caches of equal length as one batch."""
    batch = fork(caches[0])
    for i, layer in enumerate(batch.layers):
        layer.keys = torch.cat([cache.layers[i].keys for cache in caches])
        layer.values = torch.cat([cache.layers[i].values for cache in caches])
    return batch


class CodecSession:
    """Questions to a context in B formats.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal LM.
    cache : DynamicCache
        A batch of B.
    position : int
        Tokens of the context: the position of the next one, even where tokens were dropped.
    """

    def __init__(self, model: Any, cache: Any, position: int):
        self.model, self.cache, self.position = model, cache, position
        self.size = cache.layers[0].keys.shape[0]

    def _forward(self, cache: Any, tokens: Tensor, position: int, keep: int) -> Tensor:
        """Logits [B, keep, V] of the last tokens of `tokens [B, n]`; the cache grows."""
        places = torch.arange(position, position + tokens.shape[1], device=tokens.device)
        return self.model(
            input_ids=tokens,
            past_key_values=cache,
            position_ids=places[None],
            use_cache=True,
            logits_to_keep=keep,
        ).logits

    @torch.inference_mode()
    def score(self, prompt: Sequence[int], target: Sequence[int]) -> Iterator[Scores]:
        """Log-probabilities of `target` and of the whole vocabulary at its places."""
        fed = torch.tensor([*prompt, *target[:-1]], device=self.model.device)
        logits = self._forward(
            fork(self.cache), fed.expand(self.size, -1), self.position, len(target)
        )
        places = torch.tensor(target, device=self.model.device)[:, None]
        for row in logits:
            logp = row.float().log_softmax(-1)
            yield Scores(logp.gather(1, places)[:, 0], logp)

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], count: int) -> list[list[int]]:
        """`count` greedy tokens after the context and `prompt`, of each format."""
        cache, position, found = fork(self.cache), self.position, []
        tokens = torch.tensor(prompt, device=self.model.device).expand(self.size, -1)
        for _ in range(count):
            logits = self._forward(cache, tokens, position, 1)
            position += tokens.shape[1]
            tokens = logits[:, -1:].argmax(-1)
            found.append(tokens)
        return torch.cat(found, 1).tolist()
