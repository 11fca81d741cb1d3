"""Finds the projections around an attention layer, for the weight-derived recipe.

An attention implementation never learns its place in the model. PyTorch's module-registration hook tells
who adopts the layer, and later who adopts that; the query and key weights are read by pushing the
identity through the projection, which works for fused and for quantised ones alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

# What vLLM's models call the norm in front of the attention.
NORMS = (
    "input_layernorm", "self_attn_layer_norm", "ln_1", "attention_norm", "ln1", "attn_norm", "norm_1",
    "norm1", "input_norm", "operator_norm",
)  # fmt: skip


class UnreadableError(Exception):
    """Why a recipe cannot be predicted from a model's weights, as a clause."""


class Ancestry:
    """Records the module that holds an attention layer, the module that holds that one, and models.

    `adopted` is called at the first two moments, while the model is built; what it raises ends the start.
    """

    def __init__(
        self, impl: Any, adopted: Callable[[Ancestry], None] = lambda ancestry: None
    ) -> None:
        self._impl, self._tell = impl, adopted
        self.layer: nn.Module | None = None
        self.attention: nn.Module | None = None
        self.block: nn.Module | None = None
        self._models: list[nn.Module] = []
        self._handle = register_module_module_registration_hook(self._adopted)

    def _adopted(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is None:
            return
        if hasattr(type(parent), "compute_logits") and parent not in self._models:
            self._models.append(parent)
        if getattr(child, "impl", None) is self._impl:
            self.layer, self.attention = child, parent
            self._tell(self)
        elif child is self.attention:
            self.block = parent
            self._tell(self)

    def model(self) -> nn.Module:
        """The whole model around the layer: the largest that predicts tokens."""
        holding = [x for x in self._models if any(y is self.layer for y in x.modules())]
        return max(holding, key=lambda model: sum(1 for _ in model.modules()))

    def forget(self) -> None:
        """Stop listening."""
        self._handle.remove()


@dataclass
class Projections:
    """Float32 weights of one rank's heads; see `calibration.weights.weight_statistics`."""

    q_weight: torch.Tensor  # [Hq * D, hidden]
    k_weight: torch.Tensor  # [H * D, hidden]
    v_weight: torch.Tensor  # [H * D, hidden]
    q_bias: torch.Tensor | None
    k_bias: torch.Tensor | None
    norm_weight: torch.Tensor | None  # [hidden]
    q_norm: torch.Tensor | None  # [D]
    k_norm: torch.Tensor | None
    rope_inv_freq: torch.Tensor | None  # [rotated dims / 2]


def _linear(module: Any, x: torch.Tensor) -> torch.Tensor:
    out = module(x)
    return (out[0] if isinstance(out, tuple) else out).float()


def _norm(
    parent: nn.Module | None, names: tuple[str, ...], size: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Scale and offset of the first norm of that size: RMSNorm, Gemma's (one plus its weight), LayerNorm."""
    norms = (getattr(parent, name, None) for name in names)
    sized = (x for x in norms if getattr(getattr(x, "weight", None), "numel", int)() == size)
    norm: Any = next(sized, None)
    if norm is None:
        return None, None
    # Of mean zero and unit energy: every kind of norm leaves it as it is.
    x = torch.ones(1, size, dtype=norm.weight.dtype, device=norm.weight.device)
    x[:, 1::2] = -1
    up, down = norm(x)[0].float(), norm(-x)[0].float()
    return (up - down) / 2 * x[0].float(), (up + down) / 2


def _inv_freq(attention: nn.Module, hf_config: Any) -> torch.Tensor | None:
    """RoPE's angular frequencies, radians a token, from vLLM's own table of cosines and sines.

    Raises
    ------
    UnreadableError
        Positions enter in another way than by RoPE over the two halves of all heads alike.
    """
    rope: Any = getattr(attention, "rotary_emb", None)
    if getattr(hf_config, "no_rope_layers", None) or getattr(attention, "nope", False):
        raise UnreadableError("layers without positions stand beside layers with RoPE")
    if rope is None:
        parameters = getattr(hf_config, "rope_parameters", None)
        if parameters or getattr(hf_config, "rope_theta", None):
            raise UnreadableError("its layers hold no table of RoPE's angles")
        return None
    cache, row = getattr(rope, "cos_sin_cache", None), 1
    if cache is None and hasattr(rope, "long_short_cos_sin_cache"):
        # LongRoPE: one table for short requests, then one for an engine that takes long ones.
        cache = rope.long_short_cos_sin_cache
        row += rope.original_max_position_embeddings if rope.use_long_rope else 0
    if cache is None or len(cache) <= row:
        raise UnreadableError("its layers hold no table of RoPE's angles")
    if not getattr(rope, "is_neox_style", True):
        raise UnreadableError("its RoPE turns neighbouring dims")
    cos, sin = cache[row].float().chunk(2)
    return torch.atan2(sin, cos).abs()


def can_read(ancestry: Ancestry) -> bool:
    """Whether the layer's query, key and value projection is found, before it has weights."""
    projection = getattr(ancestry.attention, "qkv_proj", None)
    return getattr(projection, "input_size", None) is not None


@torch.no_grad()
def read_projections(
    ancestry: Ancestry,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    hf_config: Any,
) -> Projections:
    """Projections of one layer.

    Parameters
    ----------
    dtype : torch.dtype
        Of the model's activations; a quantised layer's own tensors say nothing of it.
    hf_config : transformers.PretrainedConfig
        Of the text model.

    Raises
    ------
    UnreadableError
        The model is built in another way than the prediction assumes.
    """
    attention: Any = ancestry.attention
    if not can_read(ancestry):
        raise UnreadableError("its projections cannot be read")
    projection, hidden = attention.qkv_proj, attention.qkv_proj.input_size
    device = next(chain(projection.parameters(), projection.buffers())).device
    # Not from zeros, which have no scale where activations are quantised.
    x = torch.ones(1, hidden, dtype=dtype, device=device)
    bias = (_linear(projection, x) + _linear(projection, -x))[0] / 2
    weight = _linear(projection, torch.eye(hidden, dtype=dtype, device=device)).T - bias[:, None]
    scale, offset = _norm(ancestry.block, NORMS, hidden)
    if offset is not None:
        bias = bias + weight @ offset
    q, k = num_heads * head_size, num_kv_heads * head_size
    has_bias = bool(bias.abs().sum() > 0)
    return Projections(
        q_weight=weight[:q],
        k_weight=weight[q : q + k],
        v_weight=weight[q + k : q + 2 * k],
        q_bias=bias[:q] if has_bias else None,
        k_bias=bias[q : q + k] if has_bias else None,
        norm_weight=scale,
        q_norm=_norm(attention, ("q_norm",), head_size)[0],
        k_norm=_norm(attention, ("k_norm",), head_size)[0],
        rope_inv_freq=_inv_freq(attention, hf_config),
    )
