"""Fragment order against bytes addressed one by one as the table of page.py says, and against plain order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch

from fourier_vllm.kernels.reference.codec import PageCodec
from fourier_vllm.kernels.reference.codecs_fragments import (
    columns_from_fragments,
    columns_to_fragments,
    rows_from_fragments,
    rows_to_fragments,
)
from fourier_vllm.page import PageLayout, Plane
from tests.support import numerics
from tests.support.numerics import assert_close
from tests.support.pages import FRAGMENT_RECIPES, bits_of, codec_of, tokens

HEAD_SIZES = (16, 64, 80, 96, 128, 192, 256)
SIZES = [(16, 64), (32, 128), (80, 64), (96, 128), (192, 64), (256, 128)]  # D, W
SWAP = (0, 2, 1, 3)

# Heads with all kinds of padding, and without columns at either end and between.
SPARSE = [[*bits, *[0] * (16 - len(bits))] for bits in ([], [2], [2, 0, 8, 4], [], [8, 2, 8], [])]


def layout_of(**changes: Any) -> PageLayout:
    """A layer that fragment order can hold, but for the changes."""
    D = changes.get("head_size", 16)
    made_of = dict(k_bits=[[8, 2, *[0] * (D - 2)]] * 2, v_bits=3, head_size=D, page_size=64)
    made_of |= dict(coefficients=8, coefficient_bits=8, itemsize=2, fragments=True)
    return PageLayout.build(**(made_of | changes))


def poisoned(codec: PageCodec, num_pages: int) -> torch.Tensor:
    return torch.full((num_pages, codec.layout.page_bytes), 0xFF, dtype=torch.uint8)


def random_bytes(*shape: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(shape[-1])
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)


@pytest.mark.parametrize("N", [4, 12, 20])
@pytest.mark.parametrize("W", [64, 128, 256])
def test_columns_lie_as_documented(W, N):
    x = random_bytes(2, N, W // 4)
    got = columns_to_fragments(x)
    assert got.shape == x.shape
    assert torch.equal(columns_from_fragments(got), x)
    found, given = got.view(2, N // 4, 8, W // 32, 4).numpy(), x.numpy()
    for i, g, r, c in np.ndindex(found.shape[1:]):
        assert (found[:, i, g, r, c] == given[:, 4 * i + SWAP[c], 8 * r + g]).all()


@pytest.mark.parametrize("D", [8, *HEAD_SIZES])  # 8: what the 1-bit plane of 16 dims has
@pytest.mark.parametrize("W", [64, 128, 256])
def test_rows_lie_as_documented(W, D):
    E = next(E for E in (4, 2, 1) if D % (8 * E) == 0)
    x = random_bytes(2, W // 4, D)
    got = rows_to_fragments(x)
    assert got.shape == (2, W // 64, D // (8 * E), 4, 8, E, 4)
    assert torch.equal(rows_from_fragments(got), x)
    found, given = got.numpy(), x.numpy()
    for k, i, t, g, r, c in np.ndindex(found.shape[1:]):
        expected = given[:, 16 * k + 4 * t + SWAP[c], 8 * (E * i + r) + g]
        assert (found[:, k, i, t, g, r, c] == expected).all()


class NaivePage:
    """Reads one number of one page at a time."""

    def __init__(self, layout: PageLayout, page: torch.Tensor, k_bits: list[list[int]]):
        self.layout, self.page = layout, page.numpy()
        self.H, self.D, self.W = len(k_bits), layout.head_size, layout.page_size
        basis = scipy.fft.dct(np.eye(self.W), axis=0, norm="ortho")
        self.basis = basis.astype(np.float16).astype(float)
        self.columns: list[tuple[int, int] | None] = []  # head and dim
        for head, row in enumerate(k_bits):
            for dim in sorted(range(self.D), key=lambda dim: (-row[dim], dim)):
                self.columns += [(head, dim)] * (row[dim] // 2)
            self.columns += [None] * (-len(self.columns) % 4)

    def number(
        self, plane: Plane | None, index: tuple, shape: tuple, dtype: type = np.float16
    ) -> Any:
        assert plane is not None
        size = np.dtype(dtype).itemsize
        assert np.prod(shape) * size == plane.nbytes
        start = plane.offset + int(np.ravel_multi_index(index, shape)) * size
        return self.page[start : start + size].view(dtype)[0].item()

    def k(self, head: int, token: int, dim: int) -> float:
        H, D, W, planes = self.H, self.D, self.W, self.layout.k
        x, rows = self.number(planes.zero, (head, dim), (H, D)), self.layout.coefficients - 1
        for row in range(rows):
            place = (head, row, dim // 4, SWAP.index(dim % 4))
            byte = self.number(planes.coef, place, (H, rows, D // 4, 4), np.uint8)
            scale = self.number(planes.coef_scale, (head, row), (H, rows))
            x += (byte - 128) * scale * self.basis[row + 1, token]
        n, j = divmod(token, W // 4)
        N = len(self.columns)
        for column, owner in enumerate(self.columns):
            if owner == (head, dim):
                place = (column // 4, j % 8, j // 8, SWAP.index(column % 4))
                byte = self.number(planes.codes, place, (N // 4, 8, W // 32, 4), np.uint8)
                x += (byte >> 2 * n & 3) * self.number(planes.scale, (column,), (N,))
        return x

    def rotated_v(self, head: int, token: int, dim: int) -> float:
        H, D, W, planes = self.H, self.D, self.W, self.layout.v
        n, j = divmod(token, W // 4)

        def byte_of(plane: Plane, first: tuple, sizes: tuple, run: int, g: int) -> int:
            E = next(E for E in (4, 2, 1) if D % (run * E) == 0)
            i, r = divmod(dim // run, E)
            place = (*first, j // 16, i, j // 4 % 4, g, r, SWAP.index(j % 4))
            shape = (*sizes, W // 64, D // (run * E), 4, 8, E, 4)
            return self.number(plane, place, shape, np.uint8)

        code = 0
        for level in range(planes.bits // 2):
            byte = byte_of(planes.codes, (level, head), (planes.bits // 2, H), 8, dim % 8)
            code += (byte >> 2 * n & 3) * 4**level
        if planes.bits == 3:
            byte = byte_of(planes.high, (head,), (H,), 16, dim % 8)
            code += (byte >> (2 * n + dim // 8 % 2) & 1) * 4
        place, shape = (head, j % 8, n, j // 8), (H, 8, 4, W // 32)
        scale, zero = (self.number(plane, place, shape) for plane in (planes.scale, planes.zero))
        return code * scale + zero


def check_bytes(codec: PageCodec, k_bits: list[list[int]], num_tokens: int) -> None:
    assert codec.layout.fragments
    pages = codec.seal(*tokens(1, codec))
    k, v = (x[0] for x in codec.reconstruct(pages))
    page = NaivePage(codec.layout, pages[0], k_bits)
    R = torch.from_numpy(numerics.rotation(page.D))
    rng = torch.Generator().manual_seed(page.D)
    for token in torch.randperm(page.W, generator=rng)[:num_tokens].tolist():
        for head in range(page.H):
            found = [page.k(head, token, dim) for dim in range(page.D)]
            assert_close("K", k[token, head], torch.tensor(found), 1e-5)
            found = [page.rotated_v(head, token, dim) for dim in range(page.D)]
            assert_close("V", v[token, head], R @ torch.tensor(found).double(), 1e-5)


@pytest.mark.parametrize("W", [64, 128, 256])
@pytest.mark.parametrize("D", HEAD_SIZES)
def test_pages_read_byte_by_byte(D, W):
    check_bytes(codec_of("coded-3", D=D, W=W, fragments=True), bits_of(D, 2, "coded"), 3)


@pytest.mark.parametrize("recipe", FRAGMENT_RECIPES)
def test_recipes_read_byte_by_byte(recipe):
    bits = bits_of(32, 2, FRAGMENT_RECIPES[recipe][0])
    check_bytes(codec_of(recipe, W=64, fragments=True), bits, 16)


def test_heads_with_few_columns_read_byte_by_byte():
    codec = PageCodec(layout_of(k_bits=SPARSE), torch.float32)
    assert codec.layout.k.column_starts == (0, 0, 4, 12, 12, 24, 24)
    check_bytes(codec, SPARSE, 16)


def test_padding_weighs_nothing():
    codec = PageCodec(layout_of(k_bits=SPARSE), torch.float32)
    pages = codec.seal(*tokens(1, codec))
    page = NaivePage(codec.layout, pages[0], SPARSE)
    N = len(page.columns)
    scales = [page.number(codec.layout.k.scale, (i,), (N,)) for i in range(N)]
    assert [scale > 0 for scale in scales] == [owner is not None for owner in page.columns]
    # The levels of a dim lie together, each worth 4 times the one before.
    for i, (owner, before) in enumerate(zip(page.columns[1:], page.columns, strict=False)):
        if owner is not None and owner == before:
            assert scales[i + 1] == 4 * scales[i]


def test_coefficients_of_nothing_are_the_bias():
    codec = PageCodec(layout_of(), torch.float32)
    pages = codec.seal(*[torch.zeros(1, 64, 2, 16)] * 2)
    coef = codec.layout.k.coef
    assert coef.nbytes == 2 * 7 * 16
    assert (pages[:, coef.offset : coef.offset + coef.nbytes] == 128).all()
    assert not any(x.any() for x in codec.reconstruct(pages))


@pytest.mark.parametrize(("D", "W"), SIZES)
@pytest.mark.parametrize("recipe", FRAGMENT_RECIPES)
def test_as_close_as_plain_order(recipe, D, W):
    codec, plain = (codec_of(recipe, D=D, W=W, fragments=x) for x in (True, False))
    assert codec.layout.fragments
    assert not plain.layout.fragments
    k, v = tokens(2, codec, seed=D)
    pages, expected = codec.seal(k, v), plain.seal(k, v)
    k_, v_ = codec.reconstruct(pages)
    k_plain, v_plain = plain.reconstruct(expected)
    assert (k_ - k).square().mean().sqrt() <= 1.01 * (k_plain - k).square().mean().sqrt()
    assert torch.equal(codec.v._codes(pages), plain.v._codes(expected))
    assert_close("V", v_plain, v_, 1e-6)


@pytest.mark.parametrize(("D", "W"), SIZES)
@pytest.mark.parametrize("recipe", FRAGMENT_RECIPES)
def test_products_equal_those_with_the_rebuilt_page(recipe, D, W):
    codec = codec_of(recipe, H=3, D=D, W=W, fragments=True)
    pages = codec.seal(*tokens(3, codec, seed=W))
    k, v = (x.double() for x in codec.reconstruct(pages))
    rng = torch.Generator().manual_seed(D)
    q, page_row = torch.randn(2, 3, 4, D, generator=rng), torch.tensor([1, 0, 1])
    expected = torch.einsum("phgd,pwhd->phgw", q[page_row].double(), k)
    assert_close("scores", expected, codec.k.scores(q, page_row, pages), 1e-4)
    p = torch.randn(3, 3, 4, W, generator=rng).softmax(-1)
    expected = torch.einsum("phgw,pwhd->phgd", p.double(), v)
    assert_close("values", expected, codec.v.finish(codec.v.combine(p, pages)), 1e-4)


@pytest.mark.parametrize("recipe", FRAGMENT_RECIPES)
def test_huge_values_stay_finite(recipe):
    codec = codec_of(recipe, W=64, fragments=True)
    k, v = (x * 1e5 for x in tokens(2, codec))
    pages = codec.seal(k, v)
    for plane in codec.layout.planes():
        if plane.itemsize == 2:
            numbers = pages[:, plane.offset : plane.offset + plane.nbytes].view(torch.float16)
            assert bool(numbers.isfinite().all()), plane.name
    for x in codec.reconstruct(pages):
        assert bool(x.isfinite().all())


@pytest.mark.parametrize("recipe", FRAGMENT_RECIPES)
def test_stale_bytes_do_not_matter(recipe):
    codec = codec_of(recipe, D=80, W=64, fragments=True)
    k, v = tokens(2, codec)
    clean, pages = codec.seal(k, v), poisoned(codec, 2)
    codec.k.seal(k, pages)
    codec.v.seal(v, pages)
    for expected, got in zip(codec.reconstruct(clean), codec.reconstruct(pages), strict=True):
        assert torch.equal(expected, got)
    q = torch.randn(1, 2, 1, 80, generator=torch.Generator().manual_seed(0))
    page_row = torch.tensor([0, 0])
    assert torch.equal(codec.k.scores(q, page_row, clean), codec.k.scores(q, page_row, pages))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="as-is"),
        *(pytest.param({"v_bits": bits}, id=f"v{bits}") for bits in (2, 4, 8)),
        *(pytest.param({"coefficients": m}, id=f"{m}-coefficients") for m in (0, 1)),
        *(pytest.param({"page_size": W}, id=f"page-{W}") for W in (128, 256)),
        *(pytest.param({"head_size": D}, id=f"head-{D}") for D in HEAD_SIZES),
        pytest.param({"k_bits": [[0] * 16]}, id="no-columns"),
    ],
)
def test_layers_in_fragment_order(changes):
    assert layout_of(**changes).fragments
    assert not layout_of(**changes, fragments=False).fragments


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"k_bits": [[8] * 16, [*[0] * 15, 16]]}, id="a-raw-dim"),
        pytest.param({"v_bits": 16}, id="v16"),
        pytest.param({"v_bits": [[2] * 16] * 2}, id="v-by-channel"),
        pytest.param({"coefficient_bits": 16}, id="16-bit-coefficients"),
        pytest.param({"coefficients": 9}, id="9-coefficients"),
        pytest.param({"page_size": 32}, id="page-32"),
        pytest.param({"head_size": 8}, id="head-8"),
        pytest.param({"head_size": 40}, id="head-40"),
    ],
)
def test_other_layers_stay_plain(changes):
    layout = layout_of(**changes)
    assert not layout.fragments
    assert layout == layout_of(**changes, fragments=False)
