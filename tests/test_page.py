"""The byte layout: the documented example, and planes that never meet."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fourier_vllm.page
from fourier_vllm.page import COLUMN_GROUP, PAGE_ALIGNMENT, PLANE_ALIGNMENT, PageLayout, align

HEAD_SIZES = (16, 32, 64, 80, 96, 128, 192, 256)
BITS = (0, 2, 4, 8, 16)


def test_worked_example():
    result = doctest.testmod(fourier_vllm.page)
    assert result.attempted >= 3
    assert not result.failed


@st.composite
def layouts(draw: st.DrawFn, fragments: bool) -> tuple[PageLayout, dict]:
    """A layout and what it was built from."""
    H, D = draw(st.integers(1, 4)), draw(st.sampled_from(HEAD_SIZES))
    W = draw(st.sampled_from((64, 128, 256) if fragments else (32, 64, 128, 256)))
    bits = st.sampled_from(BITS[:-1] if fragments else BITS)
    rows = st.lists(st.lists(bits, min_size=D, max_size=D), min_size=H, max_size=H)
    # Single-class heads too: random dims alone would never leave a class empty.
    uniform = st.lists(bits.map(lambda b: [b] * D), min_size=H, max_size=H)
    by_token = st.sampled_from((2, 3, 4, 8) if fragments else (2, 3, 4, 8, 16))
    made_of: dict[str, Any] = dict(
        k=draw(rows | uniform),
        v=draw(by_token if fragments else by_token | rows | uniform),
        m=draw(st.sampled_from((0, 1, 4, 8) if fragments else (0, 1, 4, W // 8, W - 1, W))),
        coefficient_bits=8 if fragments else draw(st.sampled_from((8, 16))),
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
        fragments=fragments,
    )
    assert layout.fragments == fragments
    return layout, made_of


EITHER_ORDER = layouts(fragments=False) | layouts(fragments=True)


@settings(max_examples=80, deadline=None)
@given(EITHER_ORDER)
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


@settings(max_examples=80, deadline=None)
@given(EITHER_ORDER)
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
        if layout.fragments:
            rows, columns = max(m - 1, 0), sum(align(sum(head) // 2, 4) for head in x[name])
            expected |= {f"{name}.coef": H * rows * D, f"{name}.coef_scale": H * rows * 2}
            expected |= {f"{name}.codes": columns * W / 4, f"{name}.scale": columns * 2}
            expected |= {f"{name}.zero": H * D * 2}
            continue
        expected[f"{name}.coef"] = H * m * D * (1 if x["coefficient_bits"] == 8 else itemsize)
        expected[f"{name}.coef_scale"] = H * m * 2 if x["coefficient_bits"] == 8 else 0
        expected[f"{name}.raw"] = flat.count(16) * W * itemsize
        expected[f"{name}.codes"] = sum(flat.count(b) * W * b / 8 for b in (8, 4, 2))
        for plane in ("scale", "zero"):
            expected[f"{name}.{plane}"] = sum(flat.count(b) for b in (8, 4, 2)) * 2
    found = {plane.name: plane.nbytes for plane in layout.planes()}
    assert found == {name: size for name, size in expected.items() if size}
    assert layout.raw_bytes == 2 * H * D * W * itemsize


@settings(max_examples=80, deadline=None)
@given(EITHER_ORDER)
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
        expected = [(i, n) for i, b in enumerate(planes.coded_bits) for n in range(b // 2)]
        assert columns == expected, "the levels of a dim lie together, lowest first"
        check_places(planes.places(D), planes.column_starts, bits, layout.fragments)
        assert planes.column_starts[-1] == planes.codes.shape[0]


def check_places(places: list[int], starts: tuple[int, ...], bits: list, fragments: bool) -> None:
    """A head's columns lie together from its start on; what pads them to a group is nobody else's."""
    group = COLUMN_GROUP if fragments else 1
    sizes = [sum(b for b in head if b < 16) // 2 for head in bits]
    assert places == [starts[head] + i for head, n in enumerate(sizes) for i in range(n)]
    assert len(set(places)) == len(places)
    assert starts[0] == 0
    for start, end, n in zip(starts, starts[1:], sizes, strict=False):
        assert start % group == 0, "no group is shared by heads"
        assert n <= end - start < n + group


@pytest.mark.parametrize(("v", "ratio"), [(2, 6.0), (3, 4.5), (16, 1.5)])
def test_ratio(v, ratio):
    k = [[8] * 8 + [4] * 24 + [2] * 40 + [0] * 56] * 8
    layout = PageLayout.build(
        k, v, head_size=128, page_size=128, coefficients=4, coefficient_bits=8, itemsize=2
    )
    assert layout.ratio == layout.raw_bytes / layout.page_bytes
    assert layout.ratio > ratio
