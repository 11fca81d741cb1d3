"""The codec and the attention in plain PyTorch against NumPy, SciPy and float64 softmax."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fourier_vllm.kernels.basis import dct_basis, rotation
from fourier_vllm.kernels.reference.codec import PageCodec
from fourier_vllm.kernels.reference.codecs import pack, quantize, unpack
from fourier_vllm.page import PageLayout
from tests.support import numerics
from tests.support.numerics import DTYPES, assert_close, read_page
from tests.support.pages import HEAD_SIZES, RECIPES, codec_of, tokens


@pytest.mark.parametrize("head_size", [*HEAD_SIZES, 8, 40, 72])
def test_rotation_is_orthonormal(head_size):
    R = rotation(head_size)
    assert_close("R R^T", torch.eye(head_size, dtype=torch.float64), R @ R.T, 1e-12)
    assert_close("R", torch.from_numpy(numerics.rotation(head_size)), R, 1e-12)
    # No dim may keep most of its energy: that is the purpose.
    assert float(R.abs().max()) < 0.7


@pytest.mark.parametrize("page_size", [32, 64, 128, 256])
def test_dct_basis_is_orthonormal(page_size):
    E = dct_basis(page_size, page_size)
    assert_close("E E^T", torch.eye(page_size, dtype=torch.float64), E @ E.T, 1e-12)
    expected = scipy.fft.dct(np.eye(page_size), axis=0, norm="ortho")
    assert_close("E", torch.from_numpy(expected), E, 1e-12)
    for m in (0, 1, 4, page_size // 8):
        assert torch.equal(dct_basis(page_size, m), E[:m])


@pytest.mark.parametrize("bits", [1, 2])
def test_pack_follows_the_documented_order(bits):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (3, 48, 5), dtype=np.uint8)
    packed = pack(torch.from_numpy(codes), bits)
    s = 48 * bits // 8
    assert packed.shape == (3, s, 5)
    for j in range(s):
        runs = (codes[:, j + i * s].astype(int) << (i * bits) for i in range(8 // bits))
        assert np.array_equal(packed[:, j].numpy(), sum(runs))
    assert np.array_equal(unpack(packed, bits).numpy(), codes)
    assert np.array_equal(numerics.unpack(packed.numpy(), bits), codes)
    along_last = torch.from_numpy(codes).mT.contiguous()
    assert torch.equal(pack(along_last, bits, dim=-1), packed.mT)
    assert torch.equal(unpack(packed.mT.contiguous(), bits, dim=-1).byte(), along_last)


def check_page(codec: PageCodec, k: torch.Tensor, v: torch.Tensor) -> None:
    """Every bound of the format, for every page of `k, v [P, W, H, D]`."""
    layout, m = codec.layout, codec.layout.coefficients
    pages = codec.seal(k, v)
    assert pages.shape == (len(k), layout.page_bytes)
    rebuilt = dict(zip("kv", codec.reconstruct(pages), strict=True))
    for p, page in enumerate(pages):
        found = read_page(layout, page, codec.k.dtype)
        for name, exact in (("k", k[p]), ("v", v[p])):
            # The reading of the bytes is the format's, not just consistent with the writing.
            got = rebuilt[name][p].double().numpy()
            x = exact.double().numpy()
            noise = 1e-5 * np.abs(x).max() + 1e-30
            np.testing.assert_allclose(got, found[name], atol=noise, rtol=1e-5)
            planes = getattr(layout, name)
            step = found[name + "_step"]
            if not hasattr(planes, "coef"):
                check_token_codec(planes.bits, x, got, step, noise)
                continue
            low = found[name + "_low"]
            flat = [b for head in bits_by_head(planes, layout) for b in head]
            bits = np.array(flat).reshape(step.shape)
            assert np.array_equal(got[:, bits == 16], x[:, bits == 16]), "raw dims are exact"
            np.testing.assert_allclose(got[:, bits == 0], low[:, bits == 0], atol=noise, rtol=1e-5)
            check_low_pass(low, x, m, planes, bits, codec.k.dtype, noise)
            residual = x - low
            for b in (2, 4, 8):
                low_end, high_end = residual.min(0), residual.max(0)
                # fp16 rounds the scale, and the zero; 2^-24 is its smallest step.
                slack = 2.0**-10 * np.maximum(abs(low_end), abs(high_end)) + 2.0**-24
                ideal = (high_end - low_end) / ((1 << b) - 1)
                assert (step <= ideal * (1 + 2.0**-10) + slack)[bits == b].all()
                error = np.abs(got - x).max(0)
                bound = step / 2 + slack + ((1 << b) - 1) * 2.0**-25 + noise
                assert (error <= bound)[bits == b].all(), (name, b)


def bits_by_head(planes, layout) -> list[list[int]]:
    D = layout.head_size
    bits = [[0] * D for _ in range(layout.num_kv_heads)]
    coded = zip(planes.coded_dims, planes.coded_bits, strict=True)
    for dim, b in [*coded, *((dim, 16) for dim in planes.raw_dims)]:
        bits[dim // D][dim % D] = b
    return bits


def check_low_pass(low, x, m, planes, bits, dtype, noise) -> None:
    """The low-pass holds the first m DCT coefficients of the tokens, to their own precision."""
    spectrum = scipy.fft.dct(low, axis=0, norm="ortho")
    assert np.abs(spectrum[m:]).max(initial=0) <= 1e-9 * max(1, np.abs(spectrum).max())
    exact = scipy.fft.dct(x, axis=0, norm="ortho")[:m]
    exact[:, bits == 16] = 0
    if planes.coef_scale is None:
        eps, limit = torch.finfo(dtype).eps, torch.finfo(dtype).max
        bound = eps * (np.abs(exact) + torch.finfo(dtype).tiny) + noise * math.sqrt(len(x))
        exact = exact.clip(-limit, limit)
    else:
        # Half a step of the scale that a coefficient row of one head shares, rounded to fp16.
        largest = np.abs(exact).max(2, keepdims=True)
        bound = largest / 127 * (0.5 + 127 * 2.0**-11) + 127 * 2.0**-24 + noise * math.sqrt(len(x))
    assert (np.abs(spectrum[:m] - exact) <= bound).all()


def check_token_codec(bits, x, got, step, noise) -> None:
    if bits == 16:
        assert np.array_equal(got, x)
        return
    R = numerics.rotation(x.shape[-1])
    rotated = x @ R
    low_end, high_end = rotated.min(-1), rotated.max(-1)
    slack = 2.0**-10 * np.maximum(abs(low_end), abs(high_end)) + 2.0**-24
    ideal = (high_end - low_end) / ((1 << bits) - 1)
    assert (step <= ideal * (1 + 2.0**-10) + slack).all()
    error = np.abs(got @ R - rotated).max(-1)
    assert (error <= step / 2 + slack + ((1 << bits) - 1) * 2.0**-25 + 4 * noise).all()
    # The rotation is orthonormal: the error of a token's vector is that of its codes.
    norm = np.sqrt(((got - x) ** 2).sum(-1))
    assert (norm <= np.sqrt(x.shape[-1]) * (error + noise) + 1e-12).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_seal_and_reconstruct(recipe, dtype):
    codec = codec_of(recipe, W=64, dtype=dtype)
    check_page(codec, *tokens(2, codec))


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("recipe", ["balanced", "quality", "mixed"])
def test_head_sizes(recipe, head_size):
    codec = codec_of(recipe, D=head_size, dtype="bfloat16")
    check_page(codec, *tokens(1, codec))


@pytest.mark.parametrize("page_size", [32, 64, 128, 256])
def test_page_sizes(page_size):
    codec = codec_of("mixed", H=1, W=page_size)
    check_page(codec, *tokens(1, codec))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coefficients", [0, 4, 32])
def test_lossless_is_exact(dtype, coefficients):
    layout = PageLayout.build(
        [[16] * 64] * 2,
        16,
        head_size=64,
        page_size=32,
        coefficients=coefficients,
        coefficient_bits=16,
        itemsize=DTYPES[dtype].itemsize,
    )
    codec = PageCodec(layout, DTYPES[dtype])
    k, v = tokens(3, codec)
    k[0, 0, 0, :2] = torch.tensor([torch.finfo(k.dtype).max, -torch.finfo(k.dtype).tiny])
    k_, v_ = codec.reconstruct(codec.seal(k, v))
    assert torch.equal(k_, k.float())
    assert torch.equal(v_, v.float())


@pytest.mark.parametrize("page_size", [32, 256])
def test_all_coefficients_are_nearly_exact(page_size):
    codec = codec_of("all-coefficients", W=page_size)
    k, v = tokens(2, codec)
    k_, v_ = codec.reconstruct(codec.seal(k, v))
    assert_close("K", k, k_, 2e-6)
    assert_close("V", v, v_, 2e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_pinned_tokens_cost_the_others_nothing(recipe):
    codec = codec_of(recipe)
    k, v = tokens(2, codec)
    pinned = torch.tensor([5, 0])
    before = codec.seal(k, v, pinned)
    k, v = k.clone(), v.clone()
    k[0, :5], v[0, :5] = 1e3, -1e3
    k[0, 2], v[0, 3] = -6e4, 6e4
    assert torch.equal(codec.seal(k, v, pinned), before), "pinned tokens change nothing at all"
    # And without pins they do: the test would notice.
    assert not torch.equal(codec.seal(k, v), before)


@pytest.mark.parametrize("recipe", ["balanced", "mixed", "paper"])
def test_pinned_page_keeps_the_bounds_of_the_others(recipe):
    codec = codec_of(recipe, W=64)
    k, v = tokens(1, codec)
    k[:, :16] = 1e3
    replaced = k.clone(), v.clone()
    for x in replaced:
        x[:, :16] = x[:, 16:].mean(1, keepdim=True)
    check_page(codec, *replaced)
    sealed = codec.reconstruct(codec.seal(k, v, torch.tensor([16])))
    plain = codec.reconstruct(codec.seal(*replaced))
    assert_close("K", plain[0], sealed[0], 1e-3)
    assert_close("V", plain[1], sealed[1], 1e-3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_whole_page_pinned(recipe):
    codec = codec_of(recipe)
    k, v = tokens(1, codec)
    k_, v_ = codec.reconstruct(codec.seal(k, v, torch.tensor([32])))
    assert not k_.any()
    assert not v_.any()


EXTREMES = {
    "zero": lambda x: torch.zeros_like(x),
    "constant": lambda x: torch.full_like(x, 3.0),
    "constant-large": lambda x: torch.full_like(x, 6e4),
    "constant-small": lambda x: torch.full_like(x, -1e-6),
    "1e4": lambda x: x * 1e4,
    "6e4-alternating": lambda x: 6e4 * torch.sign(x),
    "small": lambda x: x * 1e-3,
    "tiny": lambda x: x * 1e-6,
    "subnormal": lambda x: x * 1e-30,
    "one-outlier": lambda x: torch.where(torch.arange(x.numel()).view_as(x) == 777, 6e4, x),
    "offset": lambda x: x + 1e3,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_pages_stay_finite_and_within_bounds(extreme, dtype):
    for recipe in RECIPES:
        codec = codec_of(recipe, dtype=dtype)
        limit = torch.finfo(DTYPES[dtype]).max
        k, v = (
            EXTREMES[extreme](x.float()).clamp(-limit, limit).to(DTYPES[dtype])
            for x in tokens(1, codec)
        )
        pages = codec.seal(k, v)
        for x in codec.reconstruct(pages):
            assert bool(x.isfinite().all()), recipe
        q = torch.randn(1, 2, 3, 32, generator=torch.Generator().manual_seed(0))
        assert bool(codec.k.scores(q, torch.tensor([0]), pages).isfinite().all()), recipe
        # fp16 cannot hold a residual beyond 65504 (float32 coefficients clamp), all else can.
        if extreme not in ("1e4", "6e4-alternating", "one-outlier", "constant-large"):
            check_page(codec, k, v)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("span", [1e-5, 1e-4, 1e-3, 1e-2, 1.0, 1e3])
def test_quantize_resolves_small_spans(bits, span):
    """Half a step at every magnitude that values have: those of some first layers are below .01."""
    x = torch.linspace(-span / 2, span / 2, 97)[None]
    codes, scale, zero = quantize(x, bits)
    error = (codes * scale.float() + zero.float() - x).abs().max()
    assert int(codes.min()) == 0
    assert error <= span / ((1 << bits) - 1) / 2 + 2e-3 * span + ((1 << bits) + 1) * 2.0**-25


@settings(max_examples=25, deadline=None)
@example(values=[65504.0, -65504.0], bits=2)
@example(values=[1e30, -1e30], bits=8)
@example(values=[0.0, 0.0], bits=3)
@given(
    values=st.lists(
        st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100), min_size=1, max_size=9
    ),
    bits=st.sampled_from((2, 3, 4, 8)),
)
def test_quantize_is_finite_for_finite_input(values, bits):
    codes, scale, zero = quantize(torch.tensor([values]), bits)
    assert int(codes.max()) < 1 << bits
    assert bool((codes * scale.float() + zero.float()).isfinite().all())


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_pages(recipe):
    codec = codec_of(recipe)
    k, v = tokens(0, codec)
    none = torch.zeros(0, dtype=torch.long)
    pages = codec.seal(k, v, none)
    assert pages.shape == (0, codec.layout.page_bytes)
    assert [x.shape for x in codec.reconstruct(pages)] == [(0, 32, 2, 32)] * 2
    assert codec.k.scores(torch.zeros(4, 2, 3, 32), none, pages).shape == (0, 2, 3, 32)
    assert codec.v.combine(torch.zeros(0, 2, 3, 32), pages).shape == (0, 2, 3, 32)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("G", "D"), [(1, 80), (4, 64)])
def test_products_equal_those_with_the_rebuilt_page(recipe, G, D):
    codec = codec_of(recipe, H=3, D=D)
    pages = codec.seal(*tokens(4, codec))
    k, v = (x.double() for x in codec.reconstruct(pages))
    rng = torch.Generator().manual_seed(1)
    q, page_row = torch.randn(3, 3, G, D, generator=rng), torch.tensor([1, 0, 1, 2])
    expected = torch.einsum("phgd,pwhd->phgw", q[page_row].double(), k)
    assert_close("scores", expected, codec.k.scores(q, page_row, pages), 1e-5)
    p = torch.randn(4, 3, G, 32, generator=rng).softmax(-1)
    expected = torch.einsum("phgw,pwhd->phgd", p.double(), v)
    assert_close("values", expected, codec.v.finish(codec.v.combine(p, pages)), 1e-5)
