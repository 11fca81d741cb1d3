"""The weight-derived recipe: bits of each K dim without any calibration text.

The weight of a dim is what calibration would measure, predicted from the projections:
(energy of the queries) x (energy of the post-RoPE key that a page's m lowest DCT-II terms miss).

After the input norm, hidden states have independent channels of unit energy times the norm's
weight; a share `SLOW` of that stays put over a page, the rest is new with every token.
- What is new is white along a page: 1 - m / W of it is missed.
- What stays put, and any bias, is a constant that RoPE turns into a sinusoid. How much of that the
  DCT misses depends on the pair's frequency; `missed_share` computes it, averaged over the phase.
- Queries are dominated by a few strong directions of the hidden state. Training grows the weights
  along them, so for a share `FOCUS` of the energy the covariance is taken as (P^T P)^2, with P the
  key rows of the head (scaled to the same total).
- A norm on queries or keys rescales each head to unit energy times its weight.
- RoPE mixes the two dims of a pair, so they share the mean of their energies.

Both shares were chosen on SmolLM2-135M, so they are a prior, not a law. On three other texts, K at
the `balanced` budget, V exact: KL .053 to exact attention; .017 with measured statistics, .060
without FOCUS and with SLOW = .25, .256 with equal weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fourier_vllm._json import RecipeError
from fourier_vllm._text import nearest, show
from fourier_vllm.calibration.allocate_layer import ITEM_BYTES, allocate_bits, page_budget
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

SLOW = 0.8
FOCUS = 0.8


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


def missed_share(frequency: Tensor, page_size: int, coefficients: int) -> Tensor:
    """Share of a sinusoid's energy outside the lowest DCT-II terms of a page.

    Parameters
    ----------
    frequency : Tensor [n]
        Radians a token.
    page_size, coefficients : int
        W and m.

    Returns
    -------
    Tensor [n], float64
        0 to 1, averaged over the phase.
    """
    t = torch.arange(page_size, dtype=torch.float64)
    j = torch.arange(coefficients, dtype=torch.float64)
    basis = torch.cos(math.pi / page_size * (t + 0.5) * j[:, None]) * math.sqrt(2 / page_size)
    basis[:1] /= math.sqrt(2)  # [m, W], orthonormal
    angle = frequency.detach().to("cpu", torch.float64)[:, None] * t
    # The mean over phases is the energy of the complex exponential.
    kept = (torch.cos(angle) @ basis.T) ** 2 + (torch.sin(angle) @ basis.T) ** 2
    return (1 - kept.sum(1) / page_size).clamp(0, 1)


def query_energy(
    q_weight: Tensor,
    k_weight: Tensor,
    head_size: int,
    q_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    q_norm: Tensor | None = None,
    rope_inv_freq: Tensor | None = None,
    focus: float = FOCUS,
) -> Tensor:
    """Predicted mean square of each query dim, averaged over the query heads of a group.

    Returns
    -------
    Tensor [num_kv_heads, head_size], float64
    """
    D = head_size
    k = _scaled(k_weight, norm_weight).view(-1, D, k_weight.shape[1])  # [H, D, hidden]
    q = _scaled(q_weight, norm_weight).view(len(k), -1, k.shape[2])  # [H, G * D, hidden]
    even = q.square().sum(2)
    gram = k @ k.mT  # [H, D, D]
    gram = gram / gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)[:, None, None]
    # q (P^T P)^2 q^T through [G * D, D] products; the trace of (P^T P)^2 is that of gram^2.
    seen = q @ (k / k.square().sum(2).mean(1).clamp_min(1e-30).sqrt()[:, None, None]).mT
    strong = ((seen @ gram) * seen).sum(2) / gram.square().sum((1, 2)).clamp_min(1e-30)[:, None]
    varying = (1 - focus) * even + focus * strong * k.shape[2]
    varying = varying.cpu().double().view(-1, D)
    varying, constant = _normed(varying, _constant(q_bias, varying), q_norm)
    energy = _share_pairs(varying + constant, rope_inv_freq)
    return energy.view(len(k), -1, D).mean(1)


def residual_energy(
    k_weight: Tensor,
    head_size: int,
    k_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    k_norm: Tensor | None = None,
    rope_inv_freq: Tensor | None = None,
    page_size: int = DEFAULT_PAGE_SIZE,
    coefficients: int = 4,
    slow: float = SLOW,
) -> Tensor:
    """Predicted mean square of each post-RoPE key dim that the coefficients miss.

    Returns
    -------
    Tensor [num_kv_heads, head_size], float64
    """
    varying = _row_energy(k_weight, head_size, norm_weight)
    varying, bias = _normed(varying, _constant(k_bias, varying), k_norm)
    white = _share_pairs((1 - slow) * varying, rope_inv_freq)
    constant = _share_pairs(slow * varying + bias, rope_inv_freq)
    # Without RoPE a constant stays one, which the first coefficient holds.
    missed = torch.zeros(head_size, dtype=torch.float64)
    if rope_inv_freq is not None:
        share = missed_share(rope_inv_freq, page_size, coefficients)
        missed[: 2 * len(share)] = share.repeat(2)
    if coefficients == 0:
        missed[:] = 1
    return white * (1 - coefficients / page_size) + constant * missed


def value_energy(v_weight: Tensor, head_size: int, norm_weight: Tensor | None = None) -> Tensor:
    """Predicted mean square of each value dim about its mean.

    Returns
    -------
    Tensor [num_kv_heads, head_size], float64
    """
    return _row_energy(v_weight, head_size, norm_weight)


def weight_statistics(
    q_weight: Tensor,
    k_weight: Tensor,
    head_size: int,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    rope_inv_freq: Tensor | None = None,
    page_size: int = DEFAULT_PAGE_SIZE,
    coefficients: int = 4,
    slow: float = SLOW,
    focus: float = FOCUS,
) -> Tensor:
    """Predicted damage of each K dim at 0 bits: query energy times residual energy.

    Parameters
    ----------
    q_weight, k_weight : Tensor [Hq * D, hidden], [H * D, hidden]
        Projections; the G = Hq / H query heads of a group are neighbours.
    head_size : int
        D.
    q_bias, k_bias : Tensor or None
        [Hq * D] and [H * D].
    norm_weight : Tensor [hidden] or None
        Effective scale of the norm before the projections.
    q_norm, k_norm : Tensor [D] or None
        Effective scales of an RMSNorm of each head before RoPE.
    rope_inv_freq : Tensor [R / 2] or None
        Radians a token of the dim pairs (i, i + R / 2); dims from R on are not rotated.
    page_size, coefficients : int
        W and m.
    slow : float
        Share of the hidden state's energy that stays put over a page.
    focus : float
        Share of the queries' energy along the directions that the keys read.

    Returns
    -------
    Tensor [H, D], float64, on the CPU

    Raises
    ------
    ValueError
        The weights are not finite, or the shapes do not belong together.
    """
    Hq, H = _heads(q_weight, head_size, "q_weight"), _heads(k_weight, head_size, "k_weight")
    if Hq % H:
        raise ValueError(
            f"q_weight must have a multiple of {H} heads, found {Hq}: check the model."
        )
    query = query_energy(
        q_weight, k_weight, head_size, q_bias, norm_weight, q_norm, rope_inv_freq, focus
    )
    key = residual_energy(
        k_weight,
        head_size,
        k_bias,
        norm_weight,
        k_norm,
        rope_inv_freq,
        page_size,
        coefficients,
        slow,
    )
    weight = query * key
    if not torch.isfinite(weight).all():
        raise ValueError("q_weight and k_weight must be finite: check the checkpoint.")
    return weight


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


def _heads(weight: Tensor, head_size: int, name: str) -> int:
    heads, rest = divmod(weight.shape[0], head_size)
    if rest or heads == 0:
        rule = f"a multiple of head_size {head_size} rows"
        raise ValueError(f"{name} must have {rule}, found {weight.shape[0]}: check the model.")
    return heads


def _scaled(weight: Tensor, norm_weight: Tensor | None) -> Tensor:
    rows = weight.detach().float()
    return rows if norm_weight is None else rows * norm_weight.detach().to(rows)


def _row_energy(weight: Tensor, head_size: int, norm_weight: Tensor | None) -> Tensor:
    """Mean square [heads, D] of each row's output for channels of unit energy."""
    return _scaled(weight, norm_weight).square().sum(1).cpu().double().view(-1, head_size)


def _constant(bias: Tensor | None, like: Tensor) -> Tensor:
    if bias is None:
        return torch.zeros_like(like)
    return bias.detach().cpu().double().square().view_as(like)


def _normed(varying: Tensor, constant: Tensor, head_norm: Tensor | None) -> tuple[Tensor, Tensor]:
    """Energies [heads, D] after an RMSNorm of each head."""
    if head_norm is None:
        return varying, constant
    total = (varying + constant).mean(1, keepdim=True).clamp_min(1e-30)
    scale = head_norm.detach().cpu().double().square() / total
    return varying * scale, constant * scale


def _share_pairs(energy: Tensor, rope_inv_freq: Tensor | None) -> Tensor:
    """Give both dims of a rotated pair the mean of their energies; energy is [heads, D]."""
    if rope_inv_freq is None:
        return energy
    half = len(rope_inv_freq)
    mean = (energy[:, :half] + energy[:, half : 2 * half]) / 2
    return torch.cat([mean, mean, energy[:, 2 * half :]], 1)


def _largest(statistic: Tensor, count: int) -> list[list[int]]:
    """16 bits for the `count` largest dims of each head, none for the others."""
    bits = torch.zeros(statistic.shape, dtype=torch.int64)
    order = torch.sort(statistic.double(), dim=1, descending=True, stable=True).indices
    return bits.scatter_(1, order[:, :count].cpu(), 16).tolist()
