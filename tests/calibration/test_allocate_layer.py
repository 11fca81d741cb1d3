"""Allocation against brute force, its promises, and the budget against the real page layout."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourier_vllm.calibration.allocate_layer import (
    DISTORTION,
    allocate_bits,
    cost_bytes,
    page_budget,
)
from fourier_vllm.page import PageLayout
from fourier_vllm.recipe import PAGE_SIZES, TARGETS, RecipeError

WEIGHTS = st.floats(0, 1e6, allow_subnormal=False)


def spent(bits, page_size) -> int:
    return sum(cost_bytes(b, page_size) for b in bits.flatten().tolist())


def loss(weight, bits, distortion=DISTORTION) -> float:
    flat = zip(weight.flatten().tolist(), bits.flatten().tolist(), strict=True)
    return sum(w * distortion[b] for w, b in flat)


def brute(weight, budget, page_size, distortion=DISTORTION) -> float:
    return min(
        loss(weight, torch.tensor(choice), distortion)
        for choice in itertools.product(distortion, repeat=weight.numel())
        if spent(torch.tensor(choice), page_size) <= budget
    )


@given(st.lists(WEIGHTS, min_size=1, max_size=4), st.integers(0, 600), st.sampled_from(PAGE_SIZES))
@settings(max_examples=60, deadline=None)
def test_against_brute_force(weights, budget, page_size):
    weight = torch.tensor([weights], dtype=torch.float64)
    bits = allocate_bits(weight, budget, page_size)
    assert spent(bits, page_size) <= budget
    found, best = loss(weight, bits), brute(weight, budget, page_size)
    assert found >= best * (1 - 1e-12)
    # A knapsack filled by price is short of the best by less than one step.
    step = max(cost_bytes(8, page_size) - cost_bytes(4, page_size), cost_bytes(2, page_size))
    assert found <= brute(weight, max(0, budget - step), page_size) * (1 + 1e-12)


@given(st.lists(WEIGHTS, min_size=1, max_size=5), st.sampled_from(PAGE_SIZES), st.data())
@settings(max_examples=60, deadline=None)
def test_is_the_best_for_what_it_spends_at_a_price(weights, page_size, data):
    weight = torch.tensor([weights], dtype=torch.float64)
    price = data.draw(st.floats(1e-9, 1e6))
    choice = [
        min(
            DISTORTION,
            key=lambda b, w=w: (w * DISTORTION[b] + price * cost_bytes(b, page_size), b),  # type: ignore[misc]
        )
        for w in weights
    ]
    budget = spent(torch.tensor(choice), page_size)
    bits = allocate_bits(weight, budget, page_size)
    assert loss(weight, bits) <= loss(weight, torch.tensor([choice])) * (1 + 1e-9)


TABLES = st.fixed_dictionaries(
    {0: st.just(1.0), **{b: st.floats(0, 1) for b in (2, 4, 8)}}, optional={16: st.just(0.0)}
)


@given(
    st.lists(WEIGHTS, min_size=2, max_size=24),
    st.integers(0, 6000),
    st.sampled_from(PAGE_SIZES),
    st.just(dict(DISTORTION)) | TABLES,
)
@settings(max_examples=150, deadline=None)
def test_promises(weights, budget, page_size, distortion):
    weight = torch.tensor(weights, dtype=torch.float64).view(-1, 1)
    bits = allocate_bits(weight, budget, page_size, distortion)
    assert bits.shape == weight.shape
    used = spent(bits, page_size)
    assert used <= budget
    for w, b in zip(weights, bits.flatten().tolist(), strict=True):
        for better in distortion:
            if w * distortion[better] < w * distortion[b]:
                extra = cost_bytes(better, page_size) - cost_bytes(b, page_size)
                assert used + extra > budget
    if distortion == DISTORTION:
        # More weight, no fewer bits.
        by_weight = bits.flatten()[weight.flatten().argsort(stable=True)]
        distinct = [(w, b) for w, b in zip(sorted(weights), by_weight.tolist(), strict=True)]
        for (w0, b0), (w1, b1) in itertools.pairwise(distinct):
            assert b0 <= b1 or w0 == w1


def test_a_weight_that_grows_keeps_or_gains_bits():
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(2, 8, generator=generator)
    before = allocate_bits(weight, 500, 128)[0, 3]
    for factor in (2, 10, 1000):
        weight[0, 3] *= factor
        after = allocate_bits(weight, 500, 128)[0, 3]
        assert after >= before
        before = after
    assert before == 8


def test_extremes():
    weight = torch.rand(2, 16)
    assert allocate_bits(weight, 0, 128).eq(0).all()
    assert allocate_bits(weight, 1e9, 128).eq(8).all()
    assert allocate_bits(torch.zeros(2, 16), 1e9, 128).eq(0).all()
    assert allocate_bits(weight, 1e9, 128, {**DISTORTION, 16: 0.0}).eq(16).all()
    assert allocate_bits(weight, 1e9, 128, {0: 1.0}).eq(0).all()
    assert allocate_bits(weight.bfloat16(), 700, 128).dtype == torch.int64


def test_large_layers_are_quick():
    weight = torch.rand(64, 256).pow(8)
    bits = allocate_bits(weight, 64 * 256 * 36, 128)
    assert 64 * 256 * 36 - 36 < spent(bits, 128) <= 64 * 256 * 36


@pytest.mark.parametrize(
    ("weight", "budget", "distortion", "word"),
    [
        ([[-1.0]], 10, DISTORTION, "weight"),
        ([[float("nan")]], 10, DISTORTION, "weight"),
        ([[float("inf")]], 10, DISTORTION, "weight"),
        ([[1.0]], -1, DISTORTION, "budget_bytes"),
        ([[1.0]], float("nan"), DISTORTION, "budget_bytes"),
        ([[1.0]], 10, {2: 0.1}, "distortion"),
    ],
)
def test_refuses(weight, budget, distortion, word):
    with pytest.raises(ValueError, match=word):
        allocate_bits(torch.tensor(weight), budget, 128, distortion)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize(("heads", "head_size"), [(1, 64), (3, 64), (2, 80), (8, 128), (1, 256)])
@pytest.mark.parametrize("target", ["quality", "balanced", "compact"])
def test_budget_meets_the_ratio_of_the_real_page(target, heads, head_size, page_size):
    aim = TARGETS[target]
    shape = (heads, head_size, aim.v_bits, aim.coefficients(page_size), aim.coefficient_bits)
    budget = page_budget(aim.ratio, page_size, *shape)
    generator = torch.Generator().manual_seed(page_size + heads)
    weight = torch.randn(heads, head_size, generator=generator).exp().pow(2)
    bits = allocate_bits(weight, budget, page_size)
    layout = PageLayout.build(
        bits.tolist(),
        aim.v_bits,
        head_size=head_size,
        page_size=page_size,
        coefficients=aim.coefficients(page_size),
        coefficient_bits=aim.coefficient_bits,
        itemsize=2,
    )
    assert layout.ratio >= aim.ratio
    # Not more than alignment and one step are given away.
    slack = 256 + 96 + cost_bytes(8, page_size)
    assert layout.page_bytes > layout.raw_bytes / aim.ratio - slack or bits.eq(8).all()


def test_budget_names_the_ratio_that_works():
    with pytest.raises(RecipeError, match=r"at most \d+\.\d\d .* found 50") as caught:
        page_budget(50, 128, 3, 64, 2, 4, 8)
    best = float(str(caught.value).split("at most ")[1].split()[0])
    assert page_budget(best, 128, 3, 64, 2, 4, 8) >= 0
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(RecipeError, match="ratio must be a positive number"):
            page_budget(bad, 128, 3, 64, 2, 4, 8)
