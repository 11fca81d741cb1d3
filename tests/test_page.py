"""The byte layout: the documented example, and planes that never meet."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fourier_vllm.page
from fourier_vllm.page import PAGE_ALIGNMENT, PLANE_ALIGNMENT, PageLayout

HEAD_SIZES = (32, 64, 80, 96, 128, 192, 256)
BITS = (0, 2, 4, 8, 16)


def test_worked_example():
    result = doctest.testmod(fourier_vllm.page)
    assert result.attempted >= 3
    assert not result.failed


@st.composite
def layouts(draw: st.DrawFn) -> tuple[PageLayout, dict]:
    """A layout and what it was built from."""
    H, D = draw(st.integers(1, 4)), draw(st.sampled_from(HEAD_SIZES))
    W = draw(st.sampled_from((32, 64, 128, 256)))
    rows = st.lists(st.lists(st.sampled_from(BITS), min_size=D, max_size=D), min_size=H, max_size=H)
    # Single-class layouts too: random dims alone would never leave a class empty.
    uniform = st.sampled_from(BITS).map(lambda b: [[b] * D] * H)
    made_of: dict[str, Any] = dict(
        k=draw(rows | uniform),
        v=draw(st.sampled_from((2, 3, 4, 8, 16)) | rows | uniform),
        m=draw(st.sampled_from((0, 1, 4, W // 8, W - 1, W))),
        coefficient_bits=draw(st.sampled_from((8, 16))),
        itemsize=draw(st.sampled_from((2, 4))),
        H=H,
        D=D,
        W=W,
    )
    layout = PageLayout.build(
        made_of["k"],
        made_of["v"],
        head_size=D,
        page_size=W,
        coefficients=made_of["m"],
        coefficient_bits=made_of["coefficient_bits"],
        itemsize=made_of["itemsize"],
    )
    return layout, made_of


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_planes_are_apart_aligned_and_inside(made):
    layout, _ = made
    planes = layout.planes()
    assert layout.page_bytes % PAGE_ALIGNMENT == 0
    end = 0
    for plane in planes:
        assert plane.offset % PLANE_ALIGNMENT == 0, plane.name
        # Both at once: in order, and apart.
        assert plane.offset >= end, plane.name
        assert plane.offset - end < PLANE_ALIGNMENT, f"hole before {plane.name}"
        end = plane.offset + plane.nbytes
    assert end <= layout.page_bytes < max(end, 1) + PAGE_ALIGNMENT
    assert len({plane.name for plane in planes}) == len(planes)


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_bytes_are_those_of_the_recipe(made):
    """Every plane has the size that the table of the module gives it; empty ones vanish."""
    layout, x = made
    H, D, W, m, itemsize = (x[name] for name in ("H", "D", "W", "m", "itemsize"))
    expected = {}
    for name in ("k", "v"):
        if isinstance(x[name], int):
            bits = x[name]
            width = itemsize if bits == 16 else bits // 2 * 2 / 8
            expected[f"{name}.codes"] = H * W * D * width
            expected[f"{name}.high"] = H * W * D / 8 if bits == 3 else 0
            for plane in ("scale", "zero"):
                expected[f"{name}.{plane}"] = 0 if bits == 16 else H * W * 2
            continue
        flat = [b for head in x[name] for b in head]
        expected[f"{name}.coef"] = H * m * D * (1 if x["coefficient_bits"] == 8 else itemsize)
        expected[f"{name}.coef_scale"] = H * m * 2 if x["coefficient_bits"] == 8 else 0
        expected[f"{name}.raw"] = flat.count(16) * W * itemsize
        expected[f"{name}.codes"] = sum(flat.count(b) * W * b / 8 for b in (8, 4, 2))
        for plane in ("scale", "zero"):
            expected[f"{name}.{plane}"] = sum(flat.count(b) for b in (8, 4, 2)) * 2
    found = {plane.name: plane.nbytes for plane in layout.planes()}
    assert found == {name: size for name, size in expected.items() if size}
    assert layout.raw_bytes == 2 * H * D * W * itemsize


@settings(max_examples=40, deadline=None)
@given(layouts())
def test_every_dim_is_stored_once(made):
    layout, x = made
    for planes, bits in ((layout.k, x["k"]), (layout.v, x["v"])):
        if isinstance(bits, int):
            continue
        flat = [b for head in bits for b in head]
        D = layout.head_size
        assert list(planes.raw_dims) == [i for i, b in enumerate(flat) if b == 16]
        assert sorted(planes.coded_dims) == [i for i, b in enumerate(flat) if 0 < b < 16]
        assert all(flat[i] == b for i, b in zip(planes.coded_dims, planes.coded_bits, strict=True))
        order = [(i // D, -b, i) for i, b in zip(planes.coded_dims, planes.coded_bits, strict=True)]
        assert order == sorted(order), "by head, then bits, most first, then dim"
        columns = planes.columns()
        assert len(columns) == planes.codes.shape[0]
        expected = [(i, n) for i, b in enumerate(planes.coded_bits) for n in range(b // 2)]
        assert columns == expected, "the levels of a dim lie together, lowest first"


@pytest.mark.parametrize(("v", "ratio"), [(2, 6.0), (3, 4.5), (16, 1.5)])
def test_ratio(v, ratio):
    k = [[8] * 8 + [4] * 24 + [2] * 40 + [0] * 56] * 8
    layout = PageLayout.build(
        k, v, head_size=128, page_size=128, coefficients=4, coefficient_bits=8, itemsize=2
    )
    assert layout.ratio == layout.raw_bytes / layout.page_bytes
    assert layout.ratio > ratio
