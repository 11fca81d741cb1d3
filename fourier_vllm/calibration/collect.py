"""Runs a model over text and watches its attention: the statistics behind a recipe.

The model gets an attention function of our own. It sees queries and keys after RoPE, hands the work to
SDPA, and on the way back sees the gradient at the heads' outputs. Activations are recomputed layer by
layer on the way back and only running sums are kept, so memory does not grow with the text, and any
family that `transformers` runs through its attention interface will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fourier_vllm.calibration.hf_model import full_attention_layers
from fourier_vllm.calibration.statistics import LayerStatistics, Sums
from fourier_vllm.recipe import DEFAULT_LOCAL_WINDOW, DEFAULT_PAGE_SIZE, DEFAULT_SINK_TOKENS

IMPLEMENTATION = "fourier_collect"
MIN_DOCUMENT_PAGES = 4
# Arguments of attention functions that SDPA would silently ignore.
UNSUPPORTED = {"softcap": "attention logit soft caps", "s_aux": "learned attention sinks"}
SEED = 0

Checkpoint = Callable[[int, list[dict[str, Tensor]]], None]


def collect(
    model: Any,
    documents: Sequence[Tensor],
    page_size: int = DEFAULT_PAGE_SIZE,
    coefficients: int = 4,
    sink_tokens: int = DEFAULT_SINK_TOKENS,
    local_window: int = DEFAULT_LOCAL_WINDOW,
    done: Sequence[Mapping[str, Tensor]] = (),
    num_done: int = 0,
    checkpoint: Checkpoint | None = None,
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
    done, num_done : sequence of mapping, int
        Sums of an interrupted run, one per layer, and the documents they stand for.
    checkpoint : callable, optional
        Called after each document with the number of documents done and the sums.

    Returns
    -------
    list of LayerStatistics
        One per layer with full attention, in order.

    Raises
    ------
    ValueError
        A document is too short, the model's attention cannot be watched, or no gradients reach it.
    """
    least = MIN_DOCUMENT_PAGES * page_size
    for ids in documents:
        if len(ids) < least:
            raise ValueError(
                f"a document must have at least {least} tokens, found {len(ids)}: join some."
            )
    sizes = (page_size, coefficients, min(sink_tokens, page_size), local_window)
    layers = {i: Sums(*sizes) for i in full_attention_layers(model)}
    for layer, sums in zip(layers.values(), done, strict=False):
        layer.sums = dict(sums)
    steps, seen = len(documents) * len(layers), set[int]()
    with (
        tqdm(
            total=steps,
            initial=num_done * len(layers),
            desc="calibrate",
            unit="layer",
            disable=None,
        ) as bar,
        _watched(model, layers, seen, bar),
    ):
        for i in range(num_done, len(documents)):
            _backpropagate(model, documents[i].to(model.device), SEED + i)
            if not all(layers[i].sums for i in seen):
                raise ValueError(
                    f"model {type(model).__name__} passes no gradients through its layers, as with"
                    " quantised activations: calibrate the model before its quantisation, whose recipe"
                    " fits this one."
                )
            if not layers or seen != set(layers):
                raise ValueError(
                    f"model {type(model).__name__} does not run its attention through the interface"
                    " of transformers: leave the option `recipe` out, or --attention-backend fourier"
                    " where the engine refuses this model as well."
                )
            if checkpoint is not None:
                checkpoint(i + 1, [layer.sums for layer in layers.values()])
    return [layer.finish() for layer in layers.values()]


def _backpropagate(model: Any, ids: Tensor, seed: int) -> None:
    """Send back the log-likelihood of tokens drawn from the model's predictions for the later half."""
    with torch.inference_mode(False), torch.enable_grad():
        embedded = model.get_input_embeddings()(ids[None]).detach().requires_grad_()
        predictions = len(ids) - len(ids) // 2
        output = model(inputs_embeds=embedded, use_cache=False, logits_to_keep=predictions)
        logp = output.logits[0].float().log_softmax(-1)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(logp.detach().exp().cpu(), 1, generator=generator)
        logp.gather(1, drawn.to(logp.device)).sum().backward()


@contextmanager
def _watched(model: Any, layers: Mapping[int, Sums], seen: set[int], bar: Any) -> Iterator[None]:
    """Let the layers of `model` add to their sums on the way back, and keep no activations.

    `seen` gets the indices of the layers whose attention ran.
    """
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
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options | {"dropout": 0.0}
        )
        index = getattr(module, "layer_idx", -1)
        layer = layers.get(index)
        if layer is not None:
            seen.add(index)
        if layer is not None and output.requires_grad:
            scaling = options.get("scaling") or key.shape[-1] ** -0.5
            q, k, v = query[0].detach(), key[0].detach(), value[0].detach()

            def add(gradient: Tensor) -> None:  # [1, T, Hq, D]
                layer.add(q, k, v, scaling, gradient[0].transpose(0, 1))
                bar.update()

            output.register_hook(add)
        return output, None

    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    before = model.config._attn_implementation
    learning = [p for p in model.parameters() if p.requires_grad]
    model.set_attn_implementation(IMPLEMENTATION)
    model.requires_grad_(False)
    # Checkpointing works in training mode only; nothing is dropped.
    training = [m for m in model.modules() if not isinstance(m, torch.nn.Dropout)]
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in training:
            module.training = True
    try:
        yield
    finally:
        if model.supports_gradient_checkpointing:
            model.gradient_checkpointing_disable()
        model.eval()
        for parameter in learning:
            parameter.requires_grad_()
        model.set_attn_implementation(before)
