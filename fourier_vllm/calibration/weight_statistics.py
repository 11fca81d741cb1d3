"""What each K dim costs at 0 bits, predicted from the projections without any calibration text.

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

import torch
from torch import Tensor

from fourier_vllm.recipe import DEFAULT_PAGE_SIZE

SLOW = 0.8
FOCUS = 0.8


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
