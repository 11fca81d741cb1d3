"""What a recipe costs, with the page codec in the loop of a Hugging Face model.

A context is prefilled exactly, its sealed pages are replaced by what the format gives back, and a
continuation is scored against it. No engine is needed, and pages stay as they were at the start.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fourier_vllm.calibration.hf_model import full_attention_layers, max_tokens
from fourier_vllm.evaluation.text import documents
from fourier_vllm.kernels.reference.codec import PageCodec
from fourier_vllm.kernels.reference.codec import through_pages as codec_through_pages
from fourier_vllm.page import PageLayout
from fourier_vllm.recipe import Recipe
from fourier_vllm.recipe.describe import layouts
from fourier_vllm.window import pages_before

HELD_OUT_DOCUMENTS = 2
CONTEXT_TOKENS = 3000
SCORED_TOKENS = 256
CHARS_A_TOKEN = 8


class Loss(NamedTuple):
    """Means over the scored tokens, in nats.

    Attributes
    ----------
    nll : float
        Negative log-likelihood of the continuation.
    kl : float
        KL divergence of the predictions from those of exact attention.
    """

    nll: float
    kl: float


def through_pages(
    k: Tensor, v: Tensor, recipe: Recipe, layout: PageLayout
) -> tuple[Tensor, Tensor]:
    """What attention sees of a context of n tokens once its pages are sealed.

    Parameters
    ----------
    k, v : Tensor [H, n, D]
        Exact keys after RoPE, and values.
    layout : PageLayout
        Pages of the layer.

    Returns
    -------
    tuple of Tensor [H, n, D]
        Whole pages before the last `local_window` tokens rebuilt, the rest and the sinks as given.
    """
    W = recipe.page_size
    end = pages_before(k.shape[1], recipe.local_window, W) * W
    if end == 0:
        return k, v
    # A model computed in float32 is still served in 16 bits.
    dtype = torch.bfloat16 if k.dtype == torch.float32 else k.dtype
    codec = PageCodec(layout, dtype, k.device)
    sealed = codec_through_pages(codec, k[:, :end], v[:, :end], recipe.sink_tokens)
    return torch.cat([sealed[0], k[:, end:]], 1), torch.cat([sealed[1], v[:, end:]], 1)


@torch.inference_mode()
def score(
    model: Any, context: Tensor, continuation: Tensor, recipes: Sequence[Recipe]
) -> tuple[float, list[Loss]]:
    """Score a continuation after a context held exactly, and after the same in sealed pages.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal LM.
    context, continuation : Tensor [n], [c]
        Token ids.
    recipes : sequence of Recipe
        All for this model.

    Returns
    -------
    float
        NLL of the continuation with exact attention.
    list of Loss
        One per recipe.
    """
    from transformers import DynamicCache

    ids = torch.cat([context, continuation]).to(model.device)
    # The last token of the context predicts the first one of the continuation.
    split, layers = len(context) - 1, full_attention_layers(model)
    exact = DynamicCache(config=model.config)
    model.base_model(input_ids=ids[None, :split], past_key_values=exact, use_cache=True)

    def predict(cache: Any) -> Tensor:
        logits = model(input_ids=ids[None, split:-1], past_key_values=cache, use_cache=True).logits
        return logits[0].float().log_softmax(-1)

    def nll(logp: Tensor) -> float:
        return -float(logp.gather(1, ids[split + 1 :, None]).mean())

    logp = predict(copy.deepcopy(exact))
    losses = []
    for recipe in recipes:
        cache = copy.deepcopy(exact)
        for i, layout in zip(layers, layouts(recipe), strict=True):
            layer = cache.layers[i]
            k, v = through_pages(layer.keys[0], layer.values[0], recipe, layout)
            layer.keys, layer.values = k[None], v[None]
        logq = predict(cache)
        losses.append(Loss(nll(logq), float((logp.exp() * (logp - logq)).sum(1).mean())))
    return nll(logp), losses


def held_out(
    model: Any,
    tokenizer: Any,
    recipes: Sequence[Recipe],
    count: int = HELD_OUT_DOCUMENTS,
    context: int = CONTEXT_TOKENS,
    scored: int = SCORED_TOKENS,
) -> tuple[float, list[Loss]]:
    """Mean of `score` over documents that no calibration ever sees.

    Raises
    ------
    ValueError
        The model's context is too short to hold a sealed page.
    """
    context = min(context, max_tokens(model) - scored)
    least = max(recipe.local_window + recipe.page_size for recipe in recipes) + 1
    if context < least:
        raise ValueError(
            f"the model's context must hold {least + scored} tokens to check a recipe, found"
            f" {max_tokens(model)}: choose smaller pages or a smaller local window."
        )
    exact, found = 0.0, []
    for text in documents(count, CHARS_A_TOKEN * (context + scored)):
        ids = torch.tensor(tokenizer(text, verbose=False).input_ids[: context + scored])
        nll, losses = score(model, ids[:context], ids[context:], recipes)
        exact += nll / count
        found.append(losses)
    means = torch.tensor(found, dtype=torch.float64).mean(0)
    return exact, [Loss(*row) for row in means.tolist()]
