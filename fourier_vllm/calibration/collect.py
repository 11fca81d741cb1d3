"""Runs a model over text and watches its attention: the statistics behind a recipe.

The model gets an attention function of our own. It sees queries and keys after RoPE, adds to
running sums and hands the work to SDPA, so memory does not grow with the text, and any family that
`transformers` runs through its attention interface will do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fourier_vllm.calibration.model import full_attention_layers
from fourier_vllm.calibration.statistics import LayerStatistics, Sums
from fourier_vllm.recipe import DEFAULT_LOCAL_WINDOW, DEFAULT_PAGE_SIZE, DEFAULT_SINK_TOKENS

IMPLEMENTATION = "fourier_collect"
MIN_DOCUMENT_PAGES = 4
# Arguments of attention functions that SDPA would silently ignore.
UNSUPPORTED = {"softcap": "attention logit soft caps", "s_aux": "learned attention sinks"}


@torch.no_grad()
def collect(
    model: Any,
    documents: Sequence[Tensor],
    page_size: int = DEFAULT_PAGE_SIZE,
    coefficients: int = 4,
    sink_tokens: int = DEFAULT_SINK_TOKENS,
    local_window: int = DEFAULT_LOCAL_WINDOW,
) -> list[LayerStatistics]:
    """Run the model over documents and measure its layers with full attention.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal LM.
    documents : sequence of Tensor [T]
        Token ids, each of at least four pages.
    page_size, coefficients : int
        W and m.
    sink_tokens, local_window : int
        First and last tokens that attention reads raw.

    Returns
    -------
    list of LayerStatistics
        One per layer with full attention, in order.

    Raises
    ------
    ValueError
        A document is too short, or the model's attention cannot be watched.
    """
    least = MIN_DOCUMENT_PAGES * page_size
    for ids in documents:
        if len(ids) < least:
            raise ValueError(
                f"a document must have at least {least} tokens, found {len(ids)}: join some."
            )
    sizes = (page_size, coefficients, min(sink_tokens, page_size), local_window)
    layers = {i: Sums(*sizes) for i in full_attention_layers(model)}
    steps = len(documents) * len(layers)
    with (
        tqdm(total=steps, desc="calibrate", unit="layer", disable=None) as bar,
        _watched(model, layers, bar),
    ):
        for ids in documents:
            # Without the head: logits of a whole document would be the largest tensor.
            model.base_model(input_ids=ids[None].to(model.device), use_cache=False)
    if not layers or not all(layer.sums for layer in layers.values()):
        raise ValueError(
            f"model {type(model).__name__} does not run its attention through the interface of"
            " transformers: leave the option `recipe` out, the engine then derives one."
        )
    return [layer.finish() for layer in layers.values()]


@contextmanager
def _watched(model: Any, layers: Mapping[int, Sums], bar: Any) -> Iterator[None]:
    """Let the layers of `model` add to their sums."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        for name, feature in UNSUPPORTED.items():
            if options.get(name) is not None:
                raise ValueError(f"{feature} are not supported: choose another model.")
        layer = layers.get(getattr(module, "layer_idx", -1))
        if layer is not None:
            scaling = options.get("scaling") or key.shape[-1] ** -0.5
            layer.add(query[0], key[0], value[0], scaling)
            bar.update()
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
