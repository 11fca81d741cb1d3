"""The weight-derived recipe: its energies against simulated text, its preferences, its budgets."""

import math
from types import SimpleNamespace

import pytest
import torch

from fourier_vllm.calibration.allocate_layer import cost_bytes
from fourier_vllm.calibration.predict import layer_recipe, page_bytes_for, weight_recipe
from fourier_vllm.calibration.weight_statistics import (
    missed_share,
    query_energy,
    residual_energy,
    weight_statistics,
)
from fourier_vllm.page import PageLayout
from fourier_vllm.recipe import TARGETS, ModelFingerprint, Recipe, RecipeError, paper_counts

HIDDEN = 48
SHAPES = [  # name, query heads, KV heads, head size, bias, norms of heads
    pytest.param(9, 3, 64, False, False, id="llama-gqa"),
    pytest.param(4, 2, 64, True, False, id="qwen2-bias"),
    pytest.param(4, 2, 128, False, True, id="qwen3-norm"),
    pytest.param(2, 2, 80, True, True, id="mha-80"),
    pytest.param(4, 1, 128, False, False, id="mqa"),
]


def inv_freq(rotated, theta=10000.0):
    return theta ** -(torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)


def projections(Hq, H, D, bias=False, norms=False, rotated=None, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    def rows(heads):
        # Row sizes spread over a decade, as in trained models.
        return draw(heads * D, HIDDEN) * draw(heads * D, 1).exp() / math.sqrt(HIDDEN)

    return SimpleNamespace(
        q_weight=rows(Hq),
        k_weight=rows(H),
        v_weight=rows(H),
        q_bias=3 * draw(Hq * D) if bias else None,
        k_bias=5 * draw(H * D) if bias else None,
        norm_weight=draw(HIDDEN).abs() + 0.1,
        q_norm=draw(D).abs() + 0.1 if norms else None,
        k_norm=draw(D).abs() + 0.1 if norms else None,
        rope_inv_freq=inv_freq(rotated or D),
    )


def statistics(p, D, **options):
    return weight_statistics(
        p.q_weight,
        p.k_weight,
        D,
        p.q_bias,
        p.k_bias,
        p.norm_weight,
        p.q_norm,
        p.k_norm,
        p.rope_inv_freq,
        **options,
    )


def basis(W, m):
    t, j = torch.arange(W).double(), torch.arange(m).double()
    E = torch.cos(math.pi / W * (t + 0.5) * j[:, None]) * math.sqrt(2 / W)
    E[:1] /= math.sqrt(2)
    return E


def rope(x, freq, position):
    half = len(freq)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    angle = position[..., None] * freq
    cos, sin = torch.cos(angle), torch.sin(angle)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


@pytest.mark.parametrize("m", [0, 1, 4, 32])
def test_missed_share_is_the_residual_of_sinusoids(m):
    W = 32
    freq = torch.tensor([0.0, 1e-3, 0.05, 0.3, 1.0, 3.0], dtype=torch.float64)
    phase = torch.arange(360, dtype=torch.float64) * math.pi / 180
    wave = torch.cos(freq[:, None, None] * torch.arange(W) + phase[:, None])  # [freq, phase, W]
    E = basis(W, m)
    rest = wave - wave @ E.T @ E
    expected = rest.square().sum((1, 2)) / wave.square().sum((1, 2))
    torch.testing.assert_close(missed_share(freq, W, m), expected, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize(("Hq", "H", "D", "bias", "norms"), SHAPES)
@pytest.mark.parametrize(("m", "rotated"), [(0, None), (1, 32), (4, None)])
def test_energies_match_simulated_pages(Hq, H, D, bias, norms, m, rotated):
    W, pages, slow = 32, 600, 0.4
    p = projections(Hq, H, D, bias, False, rotated)
    g = torch.Generator().manual_seed(1)
    u = math.sqrt(slow) * torch.randn(pages, 1, HIDDEN, generator=g)
    u = u + math.sqrt(1 - slow) * torch.randn(pages, W, HIDDEN, generator=g)
    x = u * p.norm_weight
    k = (x @ p.k_weight.T + (0 if p.k_bias is None else p.k_bias)).view(pages, W, H, D)
    position = torch.randint(0, 100_000, (pages, 1), generator=g) + torch.arange(W)
    k = rope(k.permute(2, 0, 1, 3).double(), p.rope_inv_freq, position)  # [H, pages, W, D]
    E = basis(W, m)
    rest = k - E.T @ (E @ k)
    measured = rest.square().mean((1, 2))
    found = residual_energy(
        p.k_weight, D, p.k_bias, p.norm_weight, None, p.rope_inv_freq, W, m, slow
    )
    # Half a per cent of the mean: what is left of energies that cancel.
    floor = 5e-3 * measured.mean()
    error = ((found - measured) / (measured + floor)).abs()
    assert error.max() < 0.35
    assert error.mean() < 0.06

    q = (x @ p.q_weight.T + (0 if p.q_bias is None else p.q_bias)).view(pages, W, Hq, D)
    q = rope(q.permute(2, 0, 1, 3).double(), p.rope_inv_freq, position)
    measured = q.square().mean((1, 2)).view(H, -1, D).mean(1)
    found = query_energy(
        p.q_weight, p.k_weight, D, p.q_bias, p.norm_weight, None, p.rope_inv_freq, focus=0
    )
    error = ((found - measured) / measured).abs()
    assert error.max() < 0.35
    assert error.mean() < 0.06


def test_head_norms_fix_the_energy_of_a_head():
    p = projections(4, 2, 64, True, True)
    found = query_energy(p.q_weight, p.k_weight, 64, p.q_bias, p.norm_weight, torch.ones(64))
    torch.testing.assert_close(found.mean(1), torch.ones(2, dtype=torch.float64))
    # A norm takes back any size of the weights.
    args = (p.k_bias, p.norm_weight, p.k_norm, p.rope_inv_freq)
    small = residual_energy(p.k_weight, 64, *args)
    scaled = residual_energy(100 * p.k_weight, 64, 100 * p.k_bias, *args[1:])
    torch.testing.assert_close(small, scaled)


def test_focus_is_the_covariance_of_the_docstring():
    p = projections(6, 3, 8)
    focus = 0.7
    found = query_energy(p.q_weight, p.k_weight, 8, None, p.norm_weight, focus=focus)
    for h in range(3):
        P = (p.k_weight[8 * h : 8 * h + 8] * p.norm_weight).double()
        S = P.T @ P @ P.T @ P
        S = (1 - focus) * torch.eye(HIDDEN) + focus * S * HIDDEN / S.trace()
        q = (p.q_weight[16 * h : 16 * h + 16] * p.norm_weight).double()
        expected = ((q @ S) * q).sum(1).view(2, 8).mean(0)
        torch.testing.assert_close(found[h], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("Hq", "H", "D", "bias", "norms"), SHAPES)
def test_statistics_are_sound(Hq, H, D, bias, norms):
    p = projections(Hq, H, D, bias, norms)
    weight = statistics(p, D)
    assert weight.shape == (H, D)
    assert weight.dtype == torch.float64
    assert torch.isfinite(weight).all()
    assert (weight > 0).all()
    # Both dims of a pair alike; more coefficients never miss more.
    torch.testing.assert_close(weight[:, : D // 2], weight[:, D // 2 :])
    assert (statistics(p, D, coefficients=16) <= weight * (1 + 1e-9)).all()
    low = SimpleNamespace(
        **{k: v.bfloat16() if v is not None else None for k, v in vars(p).items()}
    )
    torch.testing.assert_close(statistics(low, D), weight, rtol=0.2, atol=0)


def test_all_zero_weights_need_no_bits():
    zero = torch.zeros(64, HIDDEN)
    weight = weight_statistics(zero, zero, 64, rope_inv_freq=inv_freq(64))
    assert weight.eq(0).all()
    weight = weight_statistics(zero, zero, 64, q_norm=torch.ones(64), k_norm=torch.ones(64))
    assert weight.eq(0).all()


def bits_of(weight, target="balanced", W=128):
    H, D = weight.shape
    model = ModelFingerprint(
        architecture="X", num_layers=1, num_heads=H, num_kv_heads=H, head_size=D
    )
    return torch.tensor(weight_recipe(model, target, [weight], W).layers[0].k)


@pytest.mark.parametrize("D", [64, 80, 128])
def test_large_rows_get_more_bits(D):
    p = projections(2, 1, D, seed=3)
    p.k_weight, p.q_weight = torch.randn(D, HIDDEN), torch.randn(2 * D, HIDDEN)
    p.norm_weight = None
    plain = bits_of(statistics(p, D))
    pair = [D // 8, D // 8 + D // 2]
    p.k_weight[pair] *= 30
    p.q_weight[[*pair, pair[0] + D, pair[1] + D]] *= 30
    loud = bits_of(statistics(p, D))
    assert (loud[0, pair] > plain[0, pair]).all()
    assert loud[0, pair].eq(8).all()


@pytest.mark.parametrize("D", [64, 80, 128])
def test_fast_biases_get_bits_and_slow_ones_do_not(D):
    # Biases of one size everywhere, as large as Qwen2's: only the frequency tells dims apart.
    k_bias = torch.full((D,), 30.0)
    small = torch.randn(D, HIDDEN) * 0.1
    weight = weight_statistics(
        small, small, D, k_bias=k_bias, rope_inv_freq=inv_freq(D), focus=0.0, q_bias=k_bias
    )
    bits = bits_of(weight)[0, : D // 2]
    fast, slow = bits[: D // 8], bits[-D // 4 :]
    assert fast.min() >= 4
    assert slow.max() <= 2
    assert weight[0, 0] > 50 * weight[0, D // 2 - 1]


@pytest.mark.parametrize(("Hq", "H", "D", "bias", "norms"), SHAPES)
@pytest.mark.parametrize("target", ["quality", "balanced", "compact"])
@pytest.mark.parametrize("W", [64, 128, 256])
def test_budgets_are_met(Hq, H, D, bias, norms, target, W):
    p = projections(Hq, H, D, bias, norms)
    aim = TARGETS[target]
    model = ModelFingerprint(
        architecture="X", num_layers=2, num_heads=Hq, num_kv_heads=H, head_size=D
    )
    m = aim.coefficients(W)
    weight = statistics(p, D, page_size=W, coefficients=m)
    recipe = weight_recipe(model, target, [weight, 2 * weight], W, sink_tokens=4, local_window=64)
    assert (recipe.page_size, recipe.sink_tokens, recipe.local_window) == (W, 4, 64)
    assert (recipe.coefficients, recipe.coefficient_bits) == (m, 8)
    assert (recipe.name, recipe.provenance.source) == (target, "weights")
    assert Recipe.loads(recipe.dumps()) == recipe
    assert recipe.layers[0] == recipe.layers[1] == layer_recipe(model, target, 0, W, p)
    layout = PageLayout.build(
        recipe.layers[0].k,
        recipe.layers[0].v,
        head_size=D,
        page_size=W,
        coefficients=m,
        coefficient_bits=8,
        itemsize=2,
    )
    assert layout.ratio >= aim.ratio
    assert layout.raw_bytes / page_bytes_for(layout, target) >= aim.ratio
    assert page_bytes_for(layout, target) >= layout.page_bytes
    # Heads spend the same bytes, to a step of the codes.
    spent = [sum(cost_bytes(b, W) for b in row) for row in recipe.layers[0].k]
    assert max(spent) - min(spent) < cost_bytes(4, W)


def test_ranks_agree_on_the_bytes_of_a_page():
    H, D, W = 8, 64, 128
    p = projections(16, H, D, seed=5)
    model = ModelFingerprint(
        architecture="X", num_layers=1, num_heads=16, num_kv_heads=H, head_size=D
    )
    for world in (2, 4, 8):
        sizes = set()
        for rank in range(world):
            q, k = 16 * D // world, H * D // world
            part = SimpleNamespace(**vars(p))
            part.q_weight = p.q_weight[rank * q : (rank + 1) * q]
            part.k_weight = p.k_weight[rank * k : (rank + 1) * k]
            part.v_weight = p.v_weight[rank * k : (rank + 1) * k]
            for target in ("balanced", "paper"):
                bits = layer_recipe(model, target, 0, W, part)
                aim = TARGETS[target]
                layout = PageLayout.build(
                    bits.k,
                    bits.v,
                    head_size=D,
                    page_size=W,
                    coefficients=aim.coefficients(W),
                    coefficient_bits=aim.coefficient_bits,
                    itemsize=2,
                )
                sizes.add((target, page_bytes_for(layout, target)))
            # What a head's dims weigh does not depend on the heads beside it.
            whole = statistics(p, D)[rank * H // world : (rank + 1) * H // world]
            torch.testing.assert_close(statistics(part, D), whole, rtol=1e-4, atol=0)
        assert len(sizes) == 2


@pytest.mark.parametrize(("Hq", "H", "D", "bias", "norms"), SHAPES)
def test_paper_keeps_the_loudest_dims(Hq, H, D, bias, norms):
    p = projections(Hq, H, D, bias, norms)
    model = ModelFingerprint(
        architecture="X", num_layers=8, num_heads=Hq, num_kv_heads=H, head_size=D
    )
    args = (p.k_bias, p.norm_weight, p.k_norm, p.rope_inv_freq)
    energy = residual_energy(p.k_weight, D, *args, 128, 16)
    loud = (p.v_weight * p.norm_weight).square().sum(1).view(H, D)
    for ordinal, (k, v) in enumerate(paper_counts(8, D)):
        bits = layer_recipe(model, "paper", ordinal, 128, p)
        for rows, count, by in ((bits.k, k, energy), (bits.v, v, loud)):
            for row, e in zip(rows, by, strict=True):
                kept = torch.tensor(row) == 16
                assert kept.sum() == count
                assert count == D or e[kept].min() >= e[~kept].max()
    first = weight_recipe(model, "paper", [energy] * 8)
    assert first.layers[0].v[0][:8] == (16,) * 8
    assert (first.coefficients, first.coefficient_bits) == (16, 16)


def test_lossless_needs_no_energies():
    p = projections(4, 2, 64)
    model = ModelFingerprint(
        architecture="X", num_layers=1, num_heads=4, num_kv_heads=2, head_size=64
    )
    bits = layer_recipe(model, "lossless", 0, 128, p)
    assert bits.v == 16
    assert set(sum(bits.k, ())) == {16}


@pytest.mark.parametrize("target", ["nonsense", ["balanced"], None])
def test_unknown_targets_are_refused(target):
    model = ModelFingerprint(
        architecture="X", num_layers=1, num_heads=1, num_kv_heads=1, head_size=64
    )
    with pytest.raises(RecipeError, match=r"target .* is unknown"):
        weight_recipe(model, target, [torch.ones(1, 64)])
    with pytest.raises(RecipeError, match=r"target .* is unknown"):
        layer_recipe(model, target, 0, 128, projections(1, 1, 64))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"k_weight": torch.full((64, HIDDEN), float("nan"))}, "finite"),
        ({"k_weight": torch.ones(100, HIDDEN)}, "k_weight must have a multiple of head_size 64"),
        ({"q_weight": torch.ones(0, HIDDEN)}, "q_weight must have a multiple of head_size 64"),
        ({"k_weight": torch.ones(192, HIDDEN)}, "q_weight must have a multiple of 3 heads"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, word):
    p = projections(2, 1, 64)
    vars(p).update(change)
    with pytest.raises(ValueError, match=word):
        statistics(p, 64)


def test_shapes_must_be_the_fingerprint_s():
    model = ModelFingerprint(
        architecture="X", num_layers=2, num_heads=2, num_kv_heads=2, head_size=64
    )
    with pytest.raises(RecipeError, match="statistics must have 2 layers, found 1"):
        weight_recipe(model, "balanced", [torch.ones(2, 64)])
    with pytest.raises(RecipeError, match=r"statistics\[1\] must be \(2, 64\)"):
        weight_recipe(model, "balanced", [torch.ones(2, 64), torch.ones(1, 64)])
