"""Reference attention over pages and raw tokens, beside plain softmax attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourier_vllm.kernels.reference import attention as reference_attention
from fourier_vllm.kernels.reference.attention import decode_attention, prefill_attention
from tests.support.numerics import DTYPES, assert_close
from tests.support.pages import RECIPES, codec_of, tokens


def softmax_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> torch.Tensor:
    """`q [H, G, D]` over `k, v [T, H, D]`, float64."""
    s = torch.einsum("hgd,thd->hgt", q.double(), k.double()) * scale
    return torch.einsum("hgt,thd->hgd", s.softmax(-1), v.double())


def check_decode(
    recipe: str, num_pages: list[int], num_raw: list[int], sinks: int, G: int, seed: int = 0
) -> None:
    """Rows with these numbers of pages and raw tokens, pages in shuffled order."""
    H, D, W = 2, 32, 32
    codec = codec_of(recipe, H, D, W)
    N, T, total = len(num_pages), max(num_raw), sum(num_pages)
    rng = torch.Generator().manual_seed(seed)
    k, v = tokens(total, codec, seed)
    pages = codec.seal(k, v)
    row = torch.repeat_interleave(torch.arange(N), torch.tensor(num_pages))
    slot = torch.tensor([i for n in num_pages for i in range(n)], dtype=torch.long)
    order = torch.randperm(total, generator=rng)
    q = torch.randn(N, H, G, D, generator=rng)
    k_raw, v_raw = torch.randn(2, N, T, H, D, generator=rng)
    count = torch.tensor(num_raw)[:, None]
    # Padding anywhere, and large: only the mask may keep it out.
    place = torch.stack([torch.randperm(T, generator=rng) for _ in range(N)])
    mask = place < count
    k_raw[~mask], v_raw[~mask] = 1e4, 1e4
    out = decode_attention(
        codec,
        q,
        pages[order],
        row[order],
        slot[order],
        max(num_pages),
        sinks,
        k_raw.transpose(1, 2),
        v_raw.transpose(1, 2),
        mask,
        D**-0.5,
    )
    k_page, v_page = codec.reconstruct(pages)
    for n in range(N):
        k_n, v_n = (
            torch.cat([x[row == n].flatten(0, 1)[sinks if num_pages[n] else 0 :], y[n][mask[n]]])
            for x, y in ((k_page, k_raw), (v_page, v_raw))
        )
        assert_close(f"row {n}", softmax_attention(q[n], k_n, v_n, D**-0.5), out[n], 1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_decode_attention(recipe):
    check_decode(recipe, [0, 1, 3, 2, 0], [7, 1, 0, 40, 33], sinks=4, G=2)


@pytest.mark.parametrize(
    ("num_pages", "num_raw", "sinks"),
    [
        pytest.param([0, 0], [1, 9], 16, id="no-pages"),
        pytest.param([2, 1], [1, 0], 0, id="pages-only"),
        pytest.param([1], [1], 32, id="whole-first-page-pinned"),
        pytest.param([5], [16], 16, id="one-row"),
    ],
)
def test_decode_edges(num_pages, num_raw, sinks):
    check_decode("mixed", num_pages, num_raw, sinks, G=1)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 50)), min_size=1, max_size=5),
    sinks=st.integers(0, 31),
    recipe=st.sampled_from(sorted(RECIPES)),
    group=st.sampled_from((1, 3, 8)),
)
def test_decode_of_any_batch(rows, sinks, recipe, group):
    check_decode(recipe, [r[0] for r in rows], [r[1] for r in rows], sinks, group, seed=len(rows))


@pytest.mark.parametrize("block", [1, 5, 16, 1024])
@pytest.mark.parametrize("window", [None, 1, 4, 11, 1000])
@pytest.mark.parametrize(
    ("Hq", "H"), [pytest.param(4, 4, id="mha"), pytest.param(6, 2, id="gqa"), (5, 1)]
)
@pytest.mark.parametrize(("T", "C"), [(1, 0), (1, 9), (5, 0), (17, 13), (16, 32), (11, 3)])
def test_prefill_attention(monkeypatch, T, C, Hq, H, window, block):
    monkeypatch.setattr(reference_attention, "QUERY_BLOCK", block)
    D = 24
    rng = torch.Generator().manual_seed(T * 100 + C)
    q = torch.randn(T, Hq, D, generator=rng)
    k, v = torch.randn(2, C + T, H, D, generator=rng)
    out = prefill_attention(q, k[:C], v[:C], k[C:], v[C:], 0.2, window)
    assert out.dtype == q.dtype
    for t in range(T):
        first = 0 if window is None else max(0, C + t + 1 - window)
        seen = slice(first, C + t + 1)
        expected = softmax_attention(q[t].unflatten(0, (H, -1)), k[seen], v[seen], 0.2)
        assert_close(f"query {t}", expected.flatten(0, 1), out[t], 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_prefill_keeps_the_dtype_of_the_query(dtype):
    q, k = torch.randn(3, 2, 32).to(DTYPES[dtype]), torch.randn(3, 2, 32).to(DTYPES[dtype])
    # A reconstructed context is float32.
    out = prefill_attention(q, k.float(), k.float(), k, k, 0.2)
    assert out.dtype == DTYPES[dtype]
    assert bool(out.isfinite().all())
