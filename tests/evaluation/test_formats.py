"""What formats give back, and that every bit is counted."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import scipy.integrate
import torch

from fourier_vllm.evaluation.choose import choose_formats, comparators, span_of
from fourier_vllm.evaluation.formats import COMPARATORS
from fourier_vllm.evaluation.formats.fourier import Fourier
from fourier_vllm.evaluation.formats.kivi import Kivi
from fourier_vllm.evaluation.formats.paper import Paper, fourier_basis, truncate
from fourier_vllm.evaluation.formats.rotated import Rotated, codebook, signed_rotation
from fourier_vllm.evaluation.held_out import through_pages
from fourier_vllm.evaluation.options import Options
from fourier_vllm.page import PageLayout
from fourier_vllm.recipe import (
    ModelFingerprint,
    Recipe,
    RecipeError,
    paper_counts,
    paper_pyramid,
    target_recipe,
)
from fourier_vllm.recipe.describe import layouts, ratio_of
from tests.support.numerics import assert_close

SINKS = 16


def model_of(head_size: int = 64, layers: int = 4) -> ModelFingerprint:
    return ModelFingerprint(
        architecture="LlamaForCausalLM",
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_size=head_size,
    )


def keys_and_values(
    tokens: int, head_size: int = 64, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth keys with outlying dims, noisy values, `[2, tokens, D]`."""
    g = torch.Generator().manual_seed(0)
    k = torch.randn(2, tokens, head_size, generator=g).cumsum(1) / math.sqrt(tokens)
    k[..., 3] += 30
    return k.to(dtype), torch.randn(2, tokens, head_size, generator=g).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_size", [64, 80])
@pytest.mark.parametrize("tokens", [17, 209, 384])
@pytest.mark.parametrize("name", COMPARATORS)
def test_shapes_and_finite(name: str, tokens: int, head_size: int, dtype: torch.dtype) -> None:
    k, v = keys_and_values(tokens, head_size, dtype)
    before = k.clone(), v.clone()
    form = COMPARATORS[name](model_of(head_size))
    for layer in range(4):
        held = form.hold(k, v, SINKS, layer)
        for x, exact in ((held.k, k), (held.v, v)):
            assert x.shape == exact[:, SINKS if name != "streaming" else tokens :].shape
            assert x.dtype == dtype
            assert x.isfinite().all()
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])


@pytest.mark.parametrize("name", COMPARATORS)
def test_extreme_values_stay_finite(name: str) -> None:
    k, v = (torch.zeros(2, 80, 64) for _ in range(2))
    k[:, 40], v[:, 50, 7] = 3e4, -6e4
    held = COMPARATORS[name](model_of()).hold(k, v, SINKS, 0)
    assert held.k.isfinite().all()
    assert held.v.isfinite().all()


# n = 209 - 16 = 193 tokens of 2 heads of 80, 61,760 values; counted by hand.
BITS_OF_193_TOKENS = {
    "exact": 16.0,
    "streaming": 0.0,
    "fp8": 8 + 2 * 32 / 61760,
    # 4 groups of tokens a channel and 2 groups of dims a token, 32 bits each
    "kivi2": 2 + 32 * (160 * 4 + 2 * 193 * 2) / 61760,
    "kivi4": 4 + 32 * (160 * 4 + 2 * 193 * 2) / 61760,
    "rotated3": 3 + 16 / 80,
    # layer 0: 144 of 160 K dims and 152 of 160 V dims as 6 coefficients, the rest raw, a bit a dim
    "paper": (16 * (16 * 193 + 144 * 6 + 8 * 193 + 152 * 6) + 2 * 160) / 61760,
    # and a scale for each of the low-passed
    "paper-rescaled": (16 * (16 * 193 + 144 * 7 + 8 * 193 + 152 * 7) + 2 * 160) / 61760,
}


@pytest.mark.parametrize("name", BITS_OF_193_TOKENS)
def test_bits_by_hand(name: str) -> None:
    k, v = keys_and_values(209, 80)
    held = COMPARATORS[name](model_of(80)).hold(k, v, SINKS, 0)
    assert held.bits == pytest.approx(BITS_OF_193_TOKENS[name], rel=1e-12)


def test_bits_of_whole_groups() -> None:
    """The numbers everybody quotes: a scale and a zero for 64 values, a norm for 64."""
    k, v = keys_and_values(SINKS + 128)
    assert Kivi(model_of(), 4).hold(k, v, SINKS, 0).bits == 4.5
    assert Rotated(model_of(), 4).hold(k, v, SINKS, 0).bits == 4.25


@pytest.mark.parametrize(("form", "error"), [(Kivi, 0.01), (Rotated, 0.02)])
def test_exact_at_many_bits(form: type, error: float) -> None:
    k, v = keys_and_values(209, 80)
    held = form(model_of(80), 8).hold(k, v, SINKS, 0)
    assert_close("k", k[:, SINKS:], held.k, error)
    assert_close("v", v[:, SINKS:], held.v, error)


@pytest.mark.parametrize("family", ["kivi", "rotated"])
def test_more_bits_are_better(family: str) -> None:
    k, v = keys_and_values(300)
    errors = [
        (COMPARATORS[f"{family}{b}"](model_of()).hold(k, v, SINKS, 0).v - v[:, SINKS:]).norm()
        for b in (2, 3, 4)
    ]
    assert errors == sorted(errors, reverse=True)


def test_kivi_against_its_definition() -> None:
    """Groups of 64 tokens a key channel; 64 dims a value token; float64, one group at a time."""
    k, v = keys_and_values(16 + 100, 80)
    held = Kivi(model_of(80), 3).hold(k, v, SINKS, 0)

    def quantise(x: np.ndarray) -> np.ndarray:
        zero = float(np.float16(x.min()))
        scale = float(np.float16((x.max() - zero) / 7))
        return np.clip(np.round((x - zero) / scale), 0, 7) * scale + zero

    K, V = (x[:, SINKS:].double().numpy() for x in (k, v))
    want_k, want_v = np.empty_like(K), np.empty_like(V)
    for h in range(2):
        for a, b in ((0, 64), (64, 100)):
            for d in range(80):
                want_k[h, a:b, d] = quantise(K[h, a:b, d])
        for t in range(100):
            for a, b in ((0, 64), (64, 80)):
                want_v[h, t, a:b] = quantise(V[h, t, a:b])
    assert_close("k", torch.from_numpy(want_k), held.k, 1e-3)
    assert_close("v", torch.from_numpy(want_v), held.v, 1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebook_is_lloyd_max(bits: int) -> None:
    """Every level is the mean of its cell, by numerical integration; levels are symmetric."""
    D, levels = 64, codebook(64, bits).double().numpy()
    edges = [-1, *((levels[1:] + levels[:-1]) / 2), 1]

    def density(x: float) -> float:
        return (1 - x * x) ** ((D - 3) / 2)

    for level, low, high in zip(levels, edges[:-1], edges[1:], strict=True):
        mass = scipy.integrate.quad(density, low, high)[0]
        mean = scipy.integrate.quad(lambda x: x * density(x), low, high)[0] / mass
        assert level == pytest.approx(mean, abs=2e-3)
    assert np.allclose(levels, -levels[::-1], atol=1e-3)


def test_rotation_is_orthonormal() -> None:
    for D in (64, 80):
        turn = signed_rotation(D)
        assert_close("R R^T", torch.eye(D), turn @ turn.T, 1e-5)


def test_distortion_of_the_codebook() -> None:
    """Known distortion of a Gaussian's 2-bit Lloyd-Max quantiser: .1175 of the variance."""
    x = torch.randn(1, 4000, 128, generator=torch.Generator().manual_seed(1))
    held = Rotated(model_of(128), 2).hold(x, x, 0, 0)
    found = float((held.v - x).square().mean() / x.square().mean())
    assert found == pytest.approx(0.1175, rel=0.03)


@pytest.mark.parametrize("bits", [3, 4])
def test_norms_are_kept(bits: int) -> None:
    v = keys_and_values(100)[1]
    held = Rotated(model_of(), bits).hold(v, v, 0, 0)
    assert_close("norms", v.norm(dim=-1), held.v.norm(dim=-1), 1e-3)


def low_pass(x: np.ndarray, states: int) -> np.ndarray:
    """By scipy's real FFT of `x [H, n, D]`, all other terms set to zero."""
    spectrum = scipy.fft.rfft(x, axis=1)
    kept = np.zeros_like(spectrum)
    for row in range(states):  # 1, cos 1, sin 1, cos 2, ...: a real and an imaginary part each
        j = (row + 1) // 2
        if row % 2 or row == 0:
            kept[:, j] += spectrum[:, j].real
        else:
            kept[:, j] += 1j * spectrum[:, j].imag
    return scipy.fft.irfft(kept, x.shape[1], axis=1)


@pytest.mark.parametrize("window", [64, 65, 193])
@pytest.mark.parametrize("states", [1, 2, 5, 6])
def test_fourier_form_against_the_fft(window: int, states: int) -> None:
    x = keys_and_values(window, 24)[0]
    want = low_pass(x.double().numpy(), states)
    got = truncate(x, 2 * 24, states)
    assert_close("low-pass", torch.from_numpy(want), got, 1e-3)  # coefficients are fp16


@pytest.mark.parametrize("layer", [0, 3, 6])
def test_paper_against_its_definition(layer: int) -> None:
    """Every step in float64: FFT, error of each dim, the pyramid's share of them, one by one."""
    tokens, D = 16 + 320, 64
    k, v = keys_and_values(tokens, D)
    held = Paper(model_of(layers=7)).hold(k, v, SINKS, layer)
    shares = {0: (0.9, 0.95), 3: (0.8, 0.8), 6: (0.5, 0.7)}[layer]
    for name, x, share, got in zip("kv", (k, v), shares, held[:2], strict=True):
        exact = x[:, SINKS:].double().numpy()
        want = exact.copy()
        low = low_pass(exact, 320 // 32)
        errors = {
            ((exact[h, :, d] - low[h, :, d]) ** 2).mean(): (h, d)
            for h in range(2)
            for d in range(D)
        }
        for error in sorted(errors)[: round(share * 2 * D)]:
            h, d = errors[error]
            want[h, :, d] = low[h, :, d]
        assert_close(name, torch.from_numpy(want), got, 1e-3)


def test_rescaled_dims_keep_mean_and_deviation() -> None:
    x = keys_and_values(193, 24)[0].double()
    got = truncate(x.float(), 2 * 24, 5, rescale=True).double()
    assert_close("mean", x.mean(1), got.mean(1), 1e-3)
    assert_close("deviation", x.std(1), got.std(1), 1e-3)
    low = truncate(x.float(), 2 * 24, 5).double()
    assert (got - x).norm() > (low - x).norm()  # what it costs: the fit is no longer the best one
    flat = torch.full((1, 64, 2), 3.0)
    assert_close("constant", flat, truncate(flat, 2, 1, rescale=True), 1e-3)


@pytest.mark.parametrize("window", [16, 17])
def test_complete_basis_is_orthonormal(window: int) -> None:
    basis = fourier_basis(window, window)
    assert_close("B B^T", torch.eye(window), basis @ basis.T, 1e-6)


def test_paper_keeps_the_dims_it_loses_most_on() -> None:
    x = keys_and_values(128, 32)[0]
    x[1, :, 5] = torch.randn(128, generator=torch.Generator().manual_seed(2)) * 10
    got = truncate(x, 2 * 32 - 1, 4)
    assert torch.equal(got[1, :, 5], x[1, :, 5])
    changed = (got != x).any(1)
    assert int(changed.sum()) == 2 * 32 - 1


def test_pyramid_is_the_authors_for_28_layers() -> None:
    shares = paper_pyramid(28)
    assert shares[:4] == [(0.9, 0.95)] * 4
    assert shares[4:20] == [(0.8, 0.8)] * 16
    assert shares[20:] == [(0.5, 0.7)] * 8
    assert sum(sum(pair) for pair in shares) / 56 == pytest.approx(0.76, abs=0.005)


@pytest.mark.parametrize("layers", [1, 2, 4, 30, 80])
def test_pyramid_has_every_layer(layers: int) -> None:
    assert len(paper_pyramid(layers)) == layers


@pytest.mark.parametrize("layers", [1, 28, 30])
def test_pages_have_the_same_pyramid(layers: int) -> None:
    """The recipe keeps what the window low-passes not, to the next 8 dims."""
    pairs = zip(paper_pyramid(layers), paper_counts(layers, 128), strict=True)
    for shares, counts in pairs:
        for share, count in zip(shares, counts, strict=True):
            assert abs(128 * (1 - share) - count) <= 4


def test_paper_at_full_rank_loses_nothing() -> None:
    k, v = keys_and_values(209)
    held = Paper(model_of(), states_share=1.0).hold(k, v, SINKS, 1)
    assert_close("v", v[:, SINKS:], held.v, 1e-3)


def recipe_of(**changes: object) -> Recipe:
    """Ragged bits; V at another width in every layer."""
    recipe = target_recipe(model_of(), "lossless", page_size=64, local_window=32)
    rows = [[(0, 2, 4, 8)[d % 4] for d in range(64)] for _ in range(2)]
    data = recipe.model_dump() | {
        "name": "mixed",
        "coefficients": 2,
        "coefficient_bits": 8,
        "layers": [{"k": rows, "v": v} for v in (2, 3, 4, 16)],
    }
    return Recipe.from_dict(data | changes)


def test_pages_are_the_engines() -> None:
    """Same values as calibration's loop, and the bits of whole pages over the middle's values."""
    recipe = recipe_of()
    k, v = keys_and_values(128 + 32)
    form = Fourier(recipe)
    for layer, layout in enumerate(layouts(recipe)):
        want_k, want_v = through_pages(k, v, recipe, layout)
        held = form.hold(k[:, :128], v[:, :128], SINKS, layer)
        assert torch.equal(held.k, want_k[:, SINKS:128])
        assert torch.equal(held.v, want_v[:, SINKS:128])
        assert held.bits == 8 * 2 * layout.page_bytes / (2 * 2 * (128 - SINKS) * 64)
    assert isinstance(layouts(recipe)[0], PageLayout)


def test_bits_of_pages_follow_the_recipe() -> None:
    """Without sinks the ratio of the run is the recipe's own."""
    recipe = recipe_of(sink_tokens=0)
    k, v = keys_and_values(128)
    bits = [Fourier(recipe).hold(k, v, 0, layer).bits for layer in range(4)]
    assert 16 / (sum(bits) / 4) == pytest.approx(ratio_of(recipe))


def test_pinned_tokens_over_a_page() -> None:
    k, v = keys_and_values(192)
    held = Fourier(recipe_of()).hold(k, v, 70, 0)
    assert held.k.shape == (2, 122, 64)
    assert held.k.isfinite().all()


def test_all_formats_share_the_span() -> None:
    forms = [Fourier(recipe_of()), Fourier(recipe_of(page_size=128, local_window=48), "other")]
    span = span_of(forms, 400)
    assert (span.start, span.end) == (SINKS, 256)
    with pytest.raises(ValueError, match="--context must be at least 176 "):
        span_of(forms, 175)
    assert span_of(forms, 176).end == 128


def test_formats_of_a_run(tmp_path) -> None:
    recipe = recipe_of()
    recipe.save(tmp_path / "mine.json")
    options = Options("m", recipes=[tmp_path / "mine.json"], compare=["kivi2", "streaming", "fp8"])
    names = [form.name for form in choose_formats(options, model_of())]
    assert names == ["exact", "mine", "fp8", "kivi2", "streaming"]
    everything = [form.name for form in comparators(["all"], model_of())]
    assert everything == [name for name in COMPARATORS if name != "exact"]
    assert everything[-1] == "streaming"  # its cache is shorter than the others


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(compare=["kivi5"]), "--compare has 'kivi5', which is unknown: did you mean 'kivi"),
        (dict(compare=["none"]), "nothing to evaluate"),
        (dict(compare=["paper-pages"]), "--target paper"),
        (dict(targets=["balanced"]), "fourier-vllm calibrate"),
        (dict(recipes=["mine.json", "mine.json"]), "two formats are called 'mine'"),
        (dict(recipes=["absent.json"]), "does not exist"),
    ],
)
def test_formats_refuse(options: dict, message: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe_of().save("mine.json")
    options["recipes"] = [Path(x) for x in options.get("recipes", [])]
    with pytest.raises(ValueError, match=message) as refusal:
        choose_formats(Options("m", **options), model_of())
    assert "\n" not in str(refusal.value)


def test_recipe_of_another_model_is_refused(tmp_path) -> None:
    recipe_of().save(tmp_path / "mine.json")
    options = Options("m", recipes=[tmp_path / "mine.json"])
    with pytest.raises(RecipeError, match="num_layers"):
        choose_formats(options, model_of(layers=5))
