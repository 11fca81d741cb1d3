"""The compiled CPU decode against the reference."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourier_vllm.kernels.cpu import decode as decode_cpu
from fourier_vllm.kernels.cpu import layout
from fourier_vllm.kernels.reference.attention import decode_attention
from tests.support.decode_oracle import load_blocks
from tests.support.numerics import DTYPES, assert_close
from tests.support.pages import RECIPES, codec_of, tokens

H, BLOCK_SIZE, SPARE = 2, 8, 3


def check(
    recipe: str,
    num_pages: list[int],
    num_raw: list[int],
    sinks: int = 4,
    group: int = 2,
    D: int = 32,
    W: int = 32,
    dtype: str = "float32",
    seed: int = 0,
    broken: tuple[int, float] | None = None,
) -> None:
    """Rows with these numbers of pages and raw tokens; unused blocks hold NaN, ids are random.

    `broken` is a dim of K (below D) or V and what its first raw token has there in row 0.
    """
    codec = codec_of(recipe, H, D, W, dtype)
    N, total = len(num_pages), sum(num_pages)
    rng = torch.Generator().manual_seed(seed)
    # Pages lie in wider blocks, as they do in vLLM's pool.
    cache = torch.full((total + SPARE, codec.layout.page_bytes + 256), 0xFF, dtype=torch.uint8)
    pages = cache[:, : codec.layout.page_bytes]
    page = torch.randperm(len(pages), generator=rng)[:total]
    pages[page] = codec.seal(*tokens(total, codec, seed))
    row = torch.repeat_interleave(torch.arange(N), torch.tensor(num_pages))
    slot = torch.tensor([i for n in num_pages for i in range(n)], dtype=torch.long)
    page_start = torch.tensor([0, *num_pages]).cumsum(0)

    blocks = -(-max(num_raw) // BLOCK_SIZE)
    local = torch.full((N * blocks + SPARE, H, BLOCK_SIZE, 2 * D), torch.nan)
    block = torch.randperm(len(local), generator=rng)[: N * blocks].view(N, blocks)
    mask = torch.arange(blocks * BLOCK_SIZE) < torch.tensor(num_raw)[:, None]
    for n in range(N):
        for t in range(num_raw[n]):
            cell = torch.randn(H, 2 * D, generator=rng)
            if broken and n == t == 0:
                cell[:, broken[0]] = broken[1]
            local[block[n, t // BLOCK_SIZE], :, t % BLOCK_SIZE] = cell
    local = local.to(DTYPES[dtype])
    q = torch.randn(N, H, group, D, generator=rng).to(DTYPES[dtype])

    k_raw, v_raw = load_blocks(local, block, mask).chunk(2, -1)
    expected = decode_attention(
        codec,
        q,
        pages[page],
        row,
        slot,
        max(num_pages),
        sinks,
        k_raw,
        v_raw,
        mask,
        D**-0.5,
    )
    got = decode_cpu.decode_attention(
        codec, q, pages, page, page_start, sinks, local, block, mask, D**-0.5
    )
    for n in range(N):
        finite = expected[n].isfinite()
        assert torch.equal(finite, got[n].isfinite())
        assert bool(finite.all()) == (broken is None or n > 0)
        assert_close(f"row {n}", expected[n].where(finite, 0), got[n].where(finite, 0), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_decode(recipe, dtype):
    check(recipe, [0, 1, 3, 2, 0], [7, 1, 8, 40, 33], dtype=dtype)


@pytest.mark.parametrize("recipe", ["mixed", "quality", "balanced"])
@pytest.mark.parametrize(("D", "W"), [(64, 128), (80, 64), (128, 256), (256, 32), (40, 32)])
def test_sizes(recipe, D, W):
    check(recipe, [2, 0], [17, 3], D=D, W=W, dtype="bfloat16")


def test_no_coefficients():
    check("v8", [1], [1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dim", [3, 32 + 5], ids=["k", "v"])
def test_what_is_not_finite_stays_so(dim, value, dtype):
    """A model that overflows shows it; other rows of the batch do not."""
    check("balanced", [1, 2], [40, 33], dtype=dtype, broken=(dim, value))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_work(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check("mixed", [1, 2, 0], [3, 9, 20], group=1)
    finally:
        torch.set_num_threads(before)


@settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 50)), min_size=1, max_size=5),
    sinks=st.integers(0, 31),
    recipe=st.sampled_from(sorted(RECIPES)),
    group=st.sampled_from((1, 3, 8)),
)
def test_any_batch(rows, sinks, recipe, group):
    check(recipe, [r[0] for r in rows], [r[1] for r in rows], sinks, group, seed=len(rows))


def test_a_codec_is_freed_with_its_layer():
    codec = codec_of()
    numbers = layout.numbers(codec)
    assert layout.numbers(codec) is numbers
    gone = weakref.ref(codec)
    del codec
    assert gone() is None
