"""Reverse water-filling under a byte budget: which bits each K dim of a layer gets.

A dim of weight w (query energy times energy of the residual) costs w * c(b) in the scores when its
residual is coded at b bits, and W * b / 8 + 4 bytes in a page of W tokens (nothing at b = 0). The
best total at a budget is a Lagrangian problem that splits by dim: at a price per byte, every dim
takes the steps of its curve that gain more than the price. Steps sorted by gain per byte walk
through all prices at once, so no bisection is needed. What is left over buys what still fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fourier_vllm._json import RecipeError
from fourier_vllm.page import PAGE_ALIGNMENT, PLANE_ALIGNMENT, PageLayout

# Measured share of the residual energy that is left at b bits, uniform min/max codes.
DISTORTION: Mapping[int, float] = {0: 1.0, 2: 0.12, 4: 0.0075, 8: 3e-5}
ITEM_BYTES = 2


def cost_bytes(bits: int, page_size: int) -> int:
    """Bytes of one K dim in a page: codes, fp16 scale and zero; raw at 16 bits; none at 0."""
    if bits == 0:
        return 0
    return page_size * bits // 8 + (4 if bits < 16 else 0)


def allocate_bits(
    weight: Tensor,
    budget_bytes: float,
    page_size: int,
    distortion: Mapping[int, float] = DISTORTION,
) -> Tensor:
    """Bits per dim that minimise the total distortion within a budget.

    Parameters
    ----------
    weight : Tensor [H, D]
        Query-weighted residual energy of each dim, finite and not negative.
    budget_bytes : float
        Bytes of a page for residual codes, all H heads together.
    page_size : int
        Tokens of a page.
    distortion : mapping of int to float
        Share of a dim's residual energy left at each number of bits; must hold 0.

    Returns
    -------
    Tensor [H, D], int64, on the CPU
        Never above the budget; no dim could still be improved with the bytes left over; more
        weight never means fewer bits.

    Raises
    ------
    ValueError
        A weight is negative or not finite, the budget is negative, or `distortion` lacks 0.
    """
    w = weight.detach().to("cpu", torch.float64).flatten()
    if not (torch.isfinite(w).all() and (w >= 0).all()):
        raise ValueError("weight must be finite and not negative: check the statistics.")
    if not budget_bytes >= 0:
        raise ValueError(f"budget_bytes must not be negative, found {budget_bytes}: raise it.")
    if 0 not in distortion:
        raise ValueError("distortion must hold 0 bits: add 0: 1.0.")
    hull = _lower_hull([(cost_bytes(b, page_size), c, b) for b, c in distortion.items()])
    bits = torch.tensor([b for _, _, b in hull])
    cost = torch.tensor([c for c, _, _ in hull])
    error = torch.tensor([e for _, e, _ in hull], dtype=torch.float64)
    steps = len(hull) - 1
    # [dims, steps]: slopes fall along the hull, so sorting keeps the steps of a dim in order.
    slope = (w[:, None] * (-error.diff() / cost.diff())).flatten()
    order = torch.sort(slope, descending=True, stable=True).indices
    order = order[slope[order] > 0]
    total = cost.diff().repeat(w.numel())[order].cumsum(0)
    bought = order[total <= budget_bytes] // max(1, steps)
    reached = torch.bincount(bought, minlength=w.numel())
    left = float(budget_bytes) - int(cost[reached].sum())
    return _fill(bits[reached], w, left, page_size, distortion).view(weight.shape)


def page_budget(
    ratio: float,
    page_size: int,
    num_kv_heads: int,
    head_size: int,
    v_bits: int,
    coefficients: int,
    coefficient_bits: int,
) -> int:
    """Bytes that a page of a layer has for residual codes of K at a compression ratio.

    Parameters
    ----------
    ratio : float
        Raw 16-bit bytes over page bytes, at least.
    page_size, num_kv_heads, head_size : int
        W, H and D of one layer.
    v_bits : int
        Bits of V's token codec.
    coefficients, coefficient_bits : int
        Spectral coefficients of K.

    Returns
    -------
    int
        Any codes of this many bytes make a page that meets the ratio.

    Raises
    ------
    RecipeError
        Nothing is left: names the highest ratio that works.
    """
    if not (math.isfinite(ratio) and ratio > 0):
        raise RecipeError(f"ratio must be a positive number, found {ratio}: choose about 6.")
    empty = PageLayout.build(
        [[0] * head_size] * num_kv_heads,
        v_bits,
        head_size=head_size,
        page_size=page_size,
        coefficients=coefficients,
        coefficient_bits=coefficient_bits,
        itemsize=ITEM_BYTES,
    )
    end = max(plane.offset + plane.nbytes for plane in empty.planes())
    # Codes at 8, 4 and 2 bits, scales and zeros: each may lose one alignment, and so may V.
    fixed = end + 6 * PLANE_ALIGNMENT
    page = math.floor(empty.raw_bytes / ratio) // PAGE_ALIGNMENT * PAGE_ALIGNMENT
    if page < fixed:
        least = -(-fixed // PAGE_ALIGNMENT) * PAGE_ALIGNMENT
        best = math.floor(100 * empty.raw_bytes / least) / 100
        raise RecipeError(
            f"ratio must be at most {best:.2f} with pages of {page_size} tokens, {num_kv_heads} KV"
            f" heads of {head_size}, {coefficients} coefficients and V at {v_bits} bits, found"
            f" {ratio:g}: lower the ratio, or take larger pages."
        )
    return page - fixed


def _lower_hull(points: list[tuple[int, float, int]]) -> list[tuple[int, float, int]]:
    """Points (cost, distortion, bits) on the lower convex hull, falling in distortion."""
    hull: list[tuple[int, float, int]] = []
    for point in sorted(points):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[int, float, int], b: tuple[int, float, int]) -> float:
    return (a[1] - b[1]) / (b[0] - a[0])


def _fill(
    bits: Tensor, w: Tensor, left: float, page_size: int, distortion: Mapping[int, float]
) -> Tensor:
    """Spend what is left on the best gain per byte; also reaches classes off the hull."""
    classes = sorted(distortion, key=lambda b: cost_bytes(b, page_size))
    cost = torch.tensor([cost_bytes(b, page_size) for b in classes], dtype=torch.float64)
    error = torch.tensor([distortion[b] for b in classes], dtype=torch.float64)
    index = torch.tensor([classes.index(b) for b in bits.tolist()])
    while True:
        extra = cost[None, :] - cost[index][:, None]  # [dims, classes]
        gain = w[:, None] * (error[index][:, None] - error[None, :])
        usable = (extra <= left) & (gain > 0)
        if not usable.any():
            return torch.tensor(classes)[index]
        # An upgrade that costs nothing comes first.
        value = torch.where(usable, gain / extra.clamp_min(1e-9), -1.0)
        dim, best = divmod(int(value.argmax()), len(classes))
        left -= float(extra[dim, best])
        index[dim] = best
