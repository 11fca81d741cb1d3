"""Finds the projections around an attention layer, for the weight-derived recipe.

An attention implementation never learns its place in the model. PyTorch's module-registration hook tells
who adopts the layer, and later who adopts that; the query and key weights are read by pushing the
identity through the projection, which works for fused and for quantised ones alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook


class Ancestry:
    """Records the module that holds an attention layer, and the module that holds that one.

    `adopted` is called at both moments, while the model is built; what it raises ends the start.
    """

    def __init__(
        self, impl: Any, adopted: Callable[[Ancestry], None] = lambda ancestry: None
    ) -> None:
        self._impl, self._tell = impl, adopted
        self.layer: nn.Module | None = None
        self.attention: nn.Module | None = None
        self.block: nn.Module | None = None
        self._handle = register_module_module_registration_hook(self._adopted)

    def _adopted(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is None:
            return
        if getattr(child, "impl", None) is self._impl:
            self.layer, self.attention = child, parent
            self._tell(self)
        elif child is self.attention:
            self.block = parent
            self.forget()
            self._tell(self)

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


def _norm(parent: nn.Module, name: str, size: int) -> torch.Tensor | None:
    """Effective scale of an RMSNorm: its output for a vector of ones (Gemma adds one to its weight)."""
    norm = getattr(parent, name, None)
    weight = getattr(norm, "weight", None)
    if not isinstance(norm, nn.Module) or weight is None or weight.numel() != size:
        return None
    return norm(torch.ones(1, size, dtype=weight.dtype, device=weight.device))[0].float()


def _inv_freq(attention: nn.Module, head_size: int) -> torch.Tensor | None:
    """RoPE's angular frequencies, radians a token, from vLLM's own table of cosines and sines."""
    rope = getattr(attention, "rotary_emb", None)
    cache = getattr(rope, "cos_sin_cache", None)
    if rope is None or cache is None or cache.shape[0] < 2:
        return None
    cos, sin = cache[1].float().chunk(2)
    return torch.atan2(sin, cos).abs()


def can_read(ancestry: Ancestry) -> bool:
    """Whether the layer's query, key and value projection is found, before it has weights."""
    projection = getattr(ancestry.attention, "qkv_proj", None)
    return getattr(projection, "input_size", None) is not None


@torch.no_grad()
def read_projections(ancestry: Ancestry, num_heads: int, num_kv_heads: int, head_size: int) -> Any:
    """Projections of one layer, or None where the model is built in another way."""
    attention = ancestry.attention
    projection = getattr(attention, "qkv_proj", None)
    hidden = getattr(projection, "input_size", None)
    if attention is None or projection is None or hidden is None:
        return None
    parameter = next((p for p in projection.parameters() if p.is_floating_point()), None)
    dtype = parameter.dtype if parameter is not None else torch.get_default_dtype()
    dtype = dtype if dtype.itemsize > 1 else torch.get_default_dtype()
    device = parameter.device if parameter is not None else torch.device("cpu")
    bias = _linear(projection, torch.zeros(1, hidden, dtype=dtype, device=device))[0]
    weight = _linear(projection, torch.eye(hidden, dtype=dtype, device=device)).T - bias[:, None]
    q, k = num_heads * head_size, num_kv_heads * head_size
    has_bias = bool(bias.abs().sum() > 0)
    block = ancestry.block
    return Projections(
        q_weight=weight[:q],
        k_weight=weight[q : q + k],
        v_weight=weight[q + k : q + 2 * k],
        q_bias=bias[:q] if has_bias else None,
        k_bias=bias[q : q + k] if has_bias else None,
        norm_weight=_norm(block, "input_layernorm", hidden) if block is not None else None,
        q_norm=_norm(attention, "q_norm", head_size),
        k_norm=_norm(attention, "k_norm", head_size),
        rope_inv_freq=_inv_freq(attention, head_size),
    )
