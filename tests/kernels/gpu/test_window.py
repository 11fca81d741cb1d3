"""The window's one rule in Triton, against `fourier_vllm/window.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from fourier_vllm.kernels.gpu.split import first_raw
from fourier_vllm.window import pages_before
from tests.support.triton_kernels import DEVICE, needs_triton

pytestmark = needs_triton

COUNT = 16
LENGTHS = st.lists(st.integers(1, 1 << 20), min_size=COUNT, max_size=COUNT)
PAGES = st.integers(0, 1 << 13)


@triton.jit
def rule_kernel(p_n, p_out, num_pages, gap_pages, L, W: tl.constexpr, N: tl.constexpr):
    o_n = tl.arange(0, N)
    b_out = first_raw(tl.load(p_n + o_n), num_pages, gap_pages, L, W)
    tl.store(p_out + o_n, b_out)


@settings(max_examples=50, deadline=None)
@given(LENGTHS, st.integers(16, 65536), st.sampled_from((64, 128, 256)), PAGES, PAGES)
def test_pages_end_where_the_rule_says(lengths, local_window, page_size, num_pages, gap_pages):
    n = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    out = torch.empty_like(n)
    rule_kernel[(1,)](n, out, num_pages, gap_pages, local_window, page_size, COUNT)
    rule = [pages_before(x, local_window, page_size) for x in lengths]
    assert out.tolist() == [min(num_pages, max(gap_pages, x)) for x in rule]
    rule_kernel[(1,)](n, out, 1 << 20, 0, local_window, page_size, COUNT)
    assert out.tolist() == rule
