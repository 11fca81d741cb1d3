"""One byte budget over all layers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourier_vllm.calibration.allocate_model import Curves, Pages, spend
from fourier_vllm.calibration.statistics import KEY_BITS, VALUE_BITS, LayerStatistics
from fourier_vllm.recipe import LayerRecipe, RecipeError

H, D, W, M = 2, 32, 128, 4


def statistics(layers: int, seed: int = 0, spread: float = 3.0) -> list[LayerStatistics]:
    """Layers and dims whose damage differs by orders of magnitude."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.exp(spread * torch.randn(*shape, generator=rng).double())

    found = []
    for _ in range(layers):
        layer, keys, values = draw(1), draw(H, D), draw(H)
        share = {0: 1.0, 2: 0.12, 3: 0.03, 4: 0.0075, 8: 3e-5}
        found.append(
            LayerStatistics(
                {b: layer * keys * share[b] for b in KEY_BITS},
                {b: 10 * layer * values * share[b] for b in VALUE_BITS},
                draw(H, D),
                draw(H, D),
            )
        )
    return found


def page_bytes(layers: list[LayerRecipe]) -> list[int]:
    pages = Pages(H, D, W, M, 8)
    return [
        pages.layout([list(row) for row in x.k], x.v if isinstance(x.v, int) else 0).page_bytes
        for x in layers
    ]


def damage(found: list[LayerStatistics], layers: list[LayerRecipe]) -> float:
    total = 0.0
    for x, layer in zip(found, layers, strict=True):
        for h, row in enumerate(layer.k):
            total += sum(float(x.key_damage[b][h, d]) for d, b in enumerate(row))
        total += float(x.value_damage[layer.v if isinstance(layer.v, int) else 0].sum())
    return total


RAW = 2 * H * W * D * 2


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 100), ratio=st.floats(1.9, 12), layers=st.integers(1, 6))
def test_the_budget_is_kept_and_used(seed, ratio, layers):
    found = statistics(layers, seed)
    layers_ = spend(found, ratio, W, M, 8)
    spent, budget = sum(page_bytes(layers_)), layers * RAW / ratio
    assert spent <= budget
    # One step of V in one layer is the largest that may be left over where nothing smaller is.
    assert spent > budget - H * W * D / 2 or all(b == 8 for x in layers_ for b in sum(x.k, ()))


def test_more_bytes_do_less_damage():
    found = statistics(4)
    series = [damage(found, spend(found, ratio, W, M, 8)) for ratio in (12, 8, 6, 4, 3, 2)]
    assert all(a > b for a, b in pairwise(series))


def test_layers_that_matter_get_more():
    found = statistics(1, spread=1.0) * 2
    found[1] = LayerStatistics(
        {b: 1e4 * x for b, x in found[0].key_damage.items()},
        {b: 1e4 * x for b, x in found[0].value_damage.items()},
        found[0].residual,
        found[0].value_residual,
    )
    layers = spend(found, 6, W, M, 8)
    small, large = page_bytes(layers)
    assert large > 1.5 * small
    # And beats the same bytes for both.
    even = [spend([x], 6, W, M, 8)[0] for x in found]
    assert damage(found, layers) < damage(found, even)


def test_values_nobody_reads_keep_their_low_pass_only():
    (x,) = statistics(1)
    silent = {b: torch.zeros(H).double() for b in VALUE_BITS}
    (layer,) = spend([LayerStatistics(x.key_damage, silent, x.residual, x.residual)], 6, W, M, 8)
    assert layer.v == ((0,) * D,) * H
    # Without coefficients there would be nothing left of them.
    (layer,) = spend([LayerStatistics(x.key_damage, silent, x.residual, x.residual)], 4, W, 0, 8)
    assert layer.v == 2


@pytest.mark.parametrize("seed", range(4))
def test_values_are_not_dropped_to_save_a_little(seed):
    """Their damage counts four times: it is the one that other texts change."""
    (x,) = statistics(1, seed)
    pages, price = Pages(H, D, W, M, 8), 1e-3

    def bits(dropped: float) -> int:
        values = x.value_damage | {0: torch.full((H,), dropped / H).double()}
        found = LayerStatistics(x.key_damage, values, x.residual, x.residual)
        return Curves(found, pages, shards=1).at(price)[1]

    def cost(b: int) -> float:
        return price * pages.end([[0] * D] * H, b)

    kept = bits(1e30)
    worth = float(x.value_damage[kept].sum()) + cost(kept) - cost(0)
    assert kept
    assert bits(worth / 3.9) == kept  # would be dropped if it counted once
    assert bits(worth / 4.1) == 0


def test_shards_get_equal_bytes():
    found = statistics(3)
    for x in found:
        for b in KEY_BITS:
            x.key_damage[b][1] *= 1e3
    whole, halves = spend(found, 5, W, M, 8), spend(found, 5, W, M, 8, shards=2)
    assert any(sum(x.k[0]) < sum(x.k[1]) - 32 for x in whole)
    assert all(abs(sum(x.k[0]) - sum(x.k[1])) <= 16 for x in halves)


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf"), 100.0])
def test_what_cannot_be_met_says_what_can(ratio):
    with pytest.raises(RecipeError, match=r"can be up to \d+\.\d\d times smaller \(\d\.\d\d bits"):
        spend(statistics(2), ratio, W, M, 8)
    with pytest.raises(RecipeError, match="shards must divide 2 KV heads, found 3"):
        spend(statistics(2), 6, W, M, 8, shards=3)
