"""One byte budget over all layers: bits of every K dim and of every layer's V.

Each K dim and each layer's V has a measured curve: damage, in nats a token, at each number of bits. The
least total damage at a budget is a Lagrangian problem that splits by item: at a price per byte, every
item takes the bits at which damage + price * bytes is least. The price is bisected on the bytes of real
pages; what it and alignment leave over buys what still fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fourier_vllm._json import RecipeError
from fourier_vllm.calibration.allocate_layer import ITEM_BYTES, cost_bytes
from fourier_vllm.calibration.statistics import KEY_BITS, VALUE_BITS, LayerStatistics
from fourier_vllm.page import PAGE_ALIGNMENT, PLANE_ALIGNMENT, PageLayout
from fourier_vllm.recipe import LayerRecipe

PRICES = (1e-30, 1e6)  # nats a byte: nothing is too dear, nothing is worth it
BISECTIONS = 64
CHEAPEST = KEY_BITS[0]
# Damage of values at 0 bits counts as many times: between texts it differs by 4 and more, and a layer whose
# values are needed after all costs more than its bytes could buy (docs/use/recipes.md).
LOST_VALUES = 4


def spend(
    statistics: Sequence[LayerStatistics],
    ratio: float,
    page_size: int,
    coefficients: int,
    coefficient_bits: int,
    shards: int = 1,
) -> list[LayerRecipe]:
    """Bits of every layer that do the least damage at a compression ratio.

    Parameters
    ----------
    statistics : sequence of LayerStatistics
        One per layer, all of one shape.
    ratio : float
        Raw 16-bit bytes over page bytes, all layers together, at least.
    page_size, coefficients, coefficient_bits : int
        W, m and the width of a coefficient.
    shards : int
        Groups of neighbouring heads that get equal bytes for K: as many as ranks share a model.

    Returns
    -------
    list of LayerRecipe
        Their pages meet the ratio, and come close to it unless nothing is left to buy.

    Raises
    ------
    RecipeError
        The ratio cannot be met: names the highest that can. `shards` does not divide the heads.
    """
    H, D = statistics[0].residual.shape
    pages = Pages(H, D, page_size, coefficients, coefficient_bits)
    check_budget(pages, ratio, shards)
    raw = len(statistics) * pages.layout([[CHEAPEST] * D] * H, 0).raw_bytes
    layers = [Curves(layer, pages, shards) for layer in statistics]

    def at(price: float) -> tuple[int, list[tuple[Tensor, int]]]:
        picked = [layer.at(price) for layer in layers]
        return sum(pages.layout(k.tolist(), v).page_bytes for k, v in picked), picked

    low, high = PRICES
    _, best = at(high)
    for _ in range(BISECTIONS):
        price = math.sqrt(low * high)
        total, picked = at(price)
        if total * ratio <= raw:
            high, best = price, picked
        else:
            low = price
    spare = math.floor(raw / ratio) - sum(pages.layout(k.tolist(), v).page_bytes for k, v in best)
    # What the last step of the bisection was too large for goes to the layers that suffer most.
    for i in sorted(range(len(layers)), key=lambda i: -layers[i].damage_at(*best[i])):
        k, v = best[i]
        before = pages.layout(k.tolist(), v).page_bytes
        k = layers[i].fill(k, v, before + spare // PAGE_ALIGNMENT * PAGE_ALIGNMENT)
        spare -= pages.layout(k.tolist(), v).page_bytes - before
        best[i] = k, v
    return [
        LayerRecipe.model_validate({"k": k.tolist(), "v": v or [[CHEAPEST] * D for _ in range(H)]})
        for k, v in best
    ]


def check_budget(pages: Pages, ratio: float, shards: int = 1) -> None:
    """Refuse what no statistics can change; parameters as for `spend`.

    Raises
    ------
    RecipeError
        The ratio cannot be met: names the highest that can. `shards` does not divide the heads.
    """
    if not 1 <= shards <= pages.H or pages.H % shards:
        raise RecipeError(f"shards must divide {pages.H} KV heads, found {shards}: choose another.")
    empty = [[CHEAPEST] * pages.D] * pages.H
    smallest = min(
        (pages.layout(empty, v) for v in pages.value_bits), key=lambda page: page.page_bytes
    )
    most = smallest.raw_bytes / smallest.page_bytes
    if not 0 < ratio <= most:  # NaN neither
        raise RecipeError(
            f"pages of {pages.page_size} tokens, {pages.H} KV heads of {pages.D} and"
            f" {pages.coefficients} coefficients can be up to {math.floor(100 * most) / 100:.2f} times"
            f" smaller ({math.ceil(1600 / most) / 100:.2f} bits a value), and {ratio:.4g} times was"
            " asked for: ask for less, or take larger pages."
        )


class Pages:
    """Layouts of one model's pages."""

    def __init__(self, H: int, D: int, page_size: int, coefficients: int, coefficient_bits: int):
        self.H, self.D, self.page_size = H, D, page_size
        self.coefficients, self.coefficient_bits = coefficients, coefficient_bits
        # Without coefficients nothing would be left of V at no bits.
        self.value_bits = [b for b in VALUE_BITS if b or coefficients]

    def layout(self, k: list[list[int]], v: int) -> PageLayout:
        """Pages of a layer with K at `k [H][D]` bits and V at `v` bits."""
        return PageLayout.build(
            k,
            v or [[CHEAPEST] * self.D] * self.H,
            head_size=self.D,
            page_size=self.page_size,
            coefficients=self.coefficients,
            coefficient_bits=self.coefficient_bits,
            itemsize=ITEM_BYTES,
        )

    def end(self, k: list[list[int]], v: int) -> int:
        """Bytes in use, before the page is rounded up."""
        return max(plane.offset + plane.nbytes for plane in self.layout(k, v).planes())


class Curves:
    """Damage and bytes of one layer's choices."""

    def __init__(self, layer: LayerStatistics, pages: Pages, shards: int):
        self.pages, self.shards = pages, shards
        damage = torch.stack([layer.key_damage[b] for b in KEY_BITS], -1)
        self.damage = damage.cummin(-1).values  # [H, D, options]
        self.cost = torch.tensor([float(cost_bytes(b, pages.page_size)) for b in KEY_BITS]).double()
        risk = torch.tensor([1 if b else LOST_VALUES for b in VALUE_BITS])
        values = risk * torch.stack([layer.value_damage[b].sum() for b in VALUE_BITS])
        empty = [[CHEAPEST] * pages.D] * pages.H
        self.value_bits = pages.value_bits
        self.value_damage = values.cummin(0).values[-len(self.value_bits) :]
        self.value_cost = torch.tensor([float(pages.end(empty, b)) for b in self.value_bits])

    def at(self, price: float) -> tuple[Tensor, int]:
        """Bits `[H, D]` of K and bits of V at a price."""
        index = (self.damage + price * self.cost).argmin(-1)
        if self.shards > 1:
            index = self._even(index)
        v = self.value_bits[int((self.value_damage + price * self.value_cost).argmin())]
        return torch.tensor(KEY_BITS)[index], v

    def _even(self, index: Tensor) -> Tensor:
        """Give every shard an equal share of the bytes that `index` takes."""
        budget = float(self.cost[index].sum()) / self.shards
        return torch.cat([self._within(part, budget) for part in self.damage.chunk(self.shards)])

    def _within(self, damage: Tensor, budget: float) -> Tensor:
        low, high = PRICES
        for _ in range(BISECTIONS):
            price = math.sqrt(low * high)
            index = (damage + price * self.cost).argmin(-1)
            if float(self.cost[index].sum()) > budget:
                low = price
            else:
                high = price
        return (damage + high * self.cost).argmin(-1)

    def damage_at(self, bits: Tensor, v: int) -> float:
        """Damage of K at `bits [H, D]` and V at `v` bits together."""
        index = torch.searchsorted(torch.tensor(KEY_BITS), bits)
        of_keys = float(self.damage.gather(-1, index[..., None]).sum())
        return of_keys + float(self.value_damage[self.value_bits.index(v)])

    def fill(self, bits: Tensor, v: int, limit: int) -> Tensor:
        """Spend what is left in a page of `limit` bytes, best gain per byte first."""
        if self.shards > 1:  # their pages must stay equal
            return bits
        index = torch.searchsorted(torch.tensor(KEY_BITS), bits)
        is_open, end = torch.ones_like(index, dtype=torch.bool), self.pages.end(bits.tolist(), v)
        while True:
            up = (index + 1).clamp_max(len(KEY_BITS) - 1)
            gain = self.damage.gather(-1, index[..., None]) - self.damage.gather(-1, up[..., None])
            extra = self.cost[up] - self.cost[index]
            fits = is_open & (up > index) & (end + extra < limit + PLANE_ALIGNMENT)
            value = torch.where(fits, gain[..., 0] / extra.clamp_min(1e-9), 0.0).flatten()
            dim = int(value.argmax())
            if value[dim] <= 0:
                return torch.tensor(KEY_BITS)[index]
            index.view(-1)[dim] += 1
            grown = self.pages.end(torch.tensor(KEY_BITS)[index].tolist(), v)
            if grown > limit:  # planes are aligned one by one: only trying tells
                index.view(-1)[dim] -= 1
                is_open.view(-1)[dim] = False
            else:
                end = grown
