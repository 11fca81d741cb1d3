"""The predicted recipe: bits of each K dim from statistics of the weights, see weight_statistics.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fourier_vllm._json import RecipeError
from fourier_vllm._text import nearest, show
from fourier_vllm.calibration.allocate_layer import ITEM_BYTES, allocate_bits, page_budget
from fourier_vllm.calibration.weight_statistics import (
    residual_energy,
    value_energy,
    weight_statistics,
)
from fourier_vllm.page import PAGE_ALIGNMENT, PageLayout
from fourier_vllm.recipe import (
    DEFAULT_LOCAL_WINDOW,
    DEFAULT_PAGE_SIZE,
    DEFAULT_SINK_TOKENS,
    FORMAT,
    TARGETS,
    LayerRecipe,
    ModelFingerprint,
    Provenance,
    Recipe,
    Target,
    paper_counts,
)


class LayerWeights(Protocol):
    """Projections of one attention layer, for the heads of one rank; None where there is none."""

    q_weight: Tensor  # [Hq * D, hidden]
    k_weight: Tensor  # [H * D, hidden]
    v_weight: Tensor  # [H * D, hidden]
    q_bias: Tensor | None  # [Hq * D]
    k_bias: Tensor | None  # [H * D]
    norm_weight: Tensor | None  # [hidden], effective scale of the input norm
    q_norm: Tensor | None  # [D], effective scale
    k_norm: Tensor | None  # [D]
    rope_inv_freq: Tensor | None  # [rotated dims / 2], radians a token; halves i, i + rotated / 2


def layer_bits(
    target: str,
    ordinal: int,
    num_layers: int,
    statistic: Tensor,
    page_size: int = DEFAULT_PAGE_SIZE,
    coefficients: int | None = None,
    coefficient_bits: int | None = None,
    value_statistic: Tensor | None = None,
) -> LayerRecipe:
    """Bits of one layer for a target.

    Parameters
    ----------
    target : str
        A name of `TARGETS`.
    ordinal, num_layers : int
        The layer's place; only `paper` depends on it.
    statistic : Tensor [H, D]
        Damage of each K dim at 0 bits; for `paper` its residual energy alone.
    coefficients, coefficient_bits : int or None
        None takes the target's.
    value_statistic : Tensor [H, D] or None
        Energy of each V dim for `paper`; None keeps the first dims.

    Raises
    ------
    RecipeError
        The target is unknown, or its ratio cannot be met.
    """
    aim = _aim(target)
    H, D = statistic.shape
    if target == "paper":
        k, v = paper_counts(num_layers, D)[ordinal]
        values = torch.zeros(H, D) if value_statistic is None else value_statistic
        bits = {"k": _largest(statistic, k), "v": _largest(values, v)}
        return LayerRecipe.model_validate(bits)
    v_bits = aim.v_bits or 16
    if aim.ratio is None:
        return LayerRecipe.model_validate({"k": [[16] * D] * H, "v": v_bits})
    m = aim.coefficients(page_size) if coefficients is None else coefficients
    coefficient_bits = coefficient_bits or aim.coefficient_bits
    budget = page_budget(aim.ratio, page_size, H, D, v_bits, m, coefficient_bits)
    # Head by head, a head's bits and bytes do not depend on which rank holds it.
    rows = [
        row
        for heads in statistic.chunk(H)
        for row in allocate_bits(heads, budget // H, page_size).tolist()
    ]
    return LayerRecipe.model_validate({"k": rows, "v": v_bits})


def layer_recipe(
    fingerprint: ModelFingerprint,
    target: str,
    ordinal: int,
    page_size: int,
    weights: LayerWeights,
) -> LayerRecipe:
    """Bits of the `ordinal`-th layer from the projections of the heads of one rank.

    Raises
    ------
    ValueError
        The weights are not finite or do not belong together, or the target cannot be met.
    """
    D, m = fingerprint.head_size, _aim(target).coefficients(page_size)
    keys = (weights.k_bias, weights.norm_weight, weights.k_norm, weights.rope_inv_freq)
    if target == "paper":
        # The paper looks at how well a key is rebuilt, not at who reads it.
        statistic = residual_energy(weights.k_weight, D, *keys, page_size, m)
    else:
        statistic = weight_statistics(
            weights.q_weight,
            weights.k_weight,
            D,
            weights.q_bias,
            weights.k_bias,
            weights.norm_weight,
            weights.q_norm,
            weights.k_norm,
            weights.rope_inv_freq,
            page_size,
            m,
        )
    values = value_energy(weights.v_weight, D, weights.norm_weight)
    layers = fingerprint.num_layers
    return layer_bits(target, ordinal, layers, statistic, page_size, value_statistic=values)


def page_bytes_for(layout: PageLayout, target: str) -> int:
    """Bytes of a page that every rank can hold to: the target's, else the layout's own."""
    aim = TARGETS.get(target)
    if aim is None or aim.ratio is None:
        return layout.page_bytes
    raw = 2 * layout.num_kv_heads * layout.page_size * layout.head_size * ITEM_BYTES
    return max(layout.page_bytes, int(raw / aim.ratio) // PAGE_ALIGNMENT * PAGE_ALIGNMENT)


def weight_recipe(
    fingerprint: ModelFingerprint,
    target: str,
    statistics: Sequence[Tensor],
    page_size: int = DEFAULT_PAGE_SIZE,
    local_window: int = DEFAULT_LOCAL_WINDOW,
    sink_tokens: int = DEFAULT_SINK_TOKENS,
    coefficients: int | None = None,
    coefficient_bits: int | None = None,
    value_statistics: Sequence[Tensor] | None = None,
    provenance: Provenance | None = None,
) -> Recipe:
    """A whole recipe from statistics per layer, predicted here or measured on text.

    Parameters
    ----------
    statistics : sequence of Tensor [H, D]
        One per layer; see `layer_bits`.
    value_statistics : sequence of Tensor [H, D] or None
        For `paper`.
    provenance : Provenance or None
        None says that the statistics come from the weights.

    Raises
    ------
    RecipeError
        Shapes differ from the fingerprint, the target is unknown, or its ratio cannot be met.
    """
    aim = _aim(target)
    L, shape = fingerprint.num_layers, (fingerprint.num_kv_heads, fingerprint.head_size)
    for name, tensors in (("statistics", statistics), ("value_statistics", value_statistics)):
        if tensors is None:
            continue
        if len(tensors) != L:
            raise RecipeError(
                f"{name} must have {L} layers, found {len(tensors)}: check the model."
            )
        for i, tensor in enumerate(tensors):
            if tuple(tensor.shape) != shape:
                found = tuple(tensor.shape)
                raise RecipeError(f"{name}[{i}] must be {shape}, found {found}: check the model.")
    layers = [
        layer_bits(
            target,
            i,
            L,
            statistic,
            page_size,
            coefficients,
            coefficient_bits,
            None if value_statistics is None else value_statistics[i],
        )
        for i, statistic in enumerate(statistics)
    ]
    data = {
        "format": FORMAT,
        "name": target,
        "model": fingerprint,
        "page_size": page_size,
        "sink_tokens": sink_tokens,
        "local_window": local_window,
        "coefficients": aim.coefficients(page_size) if coefficients is None else coefficients,
        "coefficient_bits": coefficient_bits or aim.coefficient_bits,
        "layers": layers,
        "provenance": provenance or Provenance(source="weights"),
    }
    return Recipe.from_dict(data, f"target {target}")


def _aim(target: str) -> Target:
    if not isinstance(target, str) or target not in TARGETS:
        raise RecipeError(f"target {show(target)} is unknown: {nearest(target, TARGETS)}.")
    return TARGETS[target]


def _largest(statistic: Tensor, count: int) -> list[list[int]]:
    """16 bits for the `count` largest dims of each head, none for the others."""
    bits = torch.zeros(statistic.shape, dtype=torch.int64)
    order = torch.sort(statistic.double(), dim=1, descending=True, stable=True).indices
    return bits.scatter_(1, order[:, :count].cpu(), 16).tolist()
