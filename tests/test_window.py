"""The one rule of what is read from pages, for ints and tensors."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fourier_vllm.window import Window, pages_before

SIZES = st.tuples(st.integers(16, 65536), st.sampled_from((32, 64, 128, 256)))


@given(st.integers(0, 1 << 20), SIZES)
def test_pages_end_before_the_window(n, sizes):
    L, W = sizes
    pages = pages_before(n, L, W)
    assert pages >= 0
    assert pages * W <= max(n - L, 0) < (pages + 1) * W
    assert pages_before(torch.tensor([n, 0], dtype=torch.int32), L, W).tolist() == [pages, 0]


@given(st.integers(1, 1 << 20), SIZES)
def test_a_query_reads_no_raw_token_beyond_the_reach(n, sizes):
    L, W = sizes
    window = Window(W, L, sink_tokens=16, block_size=16, exact_prefill=False)
    raw = n - window.pages_before(n) * W
    assert min(n, L) <= raw < window.reach
