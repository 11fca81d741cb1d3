"""Prompts by vLLM's CPU kernel, beside PyTorch's attention in float64."""

from __future__ import annotations

import pytest
import torch

from fourier_vllm.engine.cpu import prompts as cpu_prompt
from fourier_vllm.engine.cpu.prompts import prompt_attention
from fourier_vllm.kernels.reference.attention import prefill_attention
from tests.support.numerics import DTYPES, assert_close

RATIO = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 2e-3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("Hq", "H", "D"), [(4, 4, 32), (9, 3, 64), (4, 2, 80), (5, 1, 128), (2, 2, 256)]
)
@pytest.mark.parametrize(
    ("T", "C"), [(1, 0), (1, 9), (5, 0), (127, 0), (128, 128), (33, 300), (257, 1), (300, 725)]
)
def test_prompt(T, C, Hq, H, D, dtype):
    q, kv = torch.randn(T, Hq, D), torch.randn(2, C + T, H, D)
    # As split from one projection: rows are not contiguous.
    whole = torch.cat([q.flatten(1), kv[0, C:].flatten(1), kv[1, C:].flatten(1)], 1).to(
        DTYPES[dtype]
    )
    q, k, v = (x.unflatten(1, (-1, D)) for x in whole.split([Hq * D, H * D, H * D], 1))
    # A context comes rebuilt in float32.
    args = (q, *(kv[:, :C] * 0.7), k, v)
    out = prompt_attention(*args, 0.11)  # type: ignore[call-arg]
    assert out.dtype == q.dtype
    seen = (x.to(q.dtype).double() for x in args)
    expected = prefill_attention(*seen, 0.11)  # type: ignore[call-arg]
    assert_close("out", expected, out, RATIO[dtype])


def test_garbage_behind_the_last_token_is_not_seen(monkeypatch):
    """Memory that another layer left full of NaN."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *n: new_empty(x, *n).fill_(torch.nan))
    q, k, v = torch.randn(3, 200, 2, 64)
    out = prompt_attention(q, k[:0], v[:0], k, v, 0.1)
    assert_close("out", prefill_attention(q, k[:0], v[:0], k, v, 0.1), out, 1e-5)


def test_head_sizes_without_a_kernel(monkeypatch):
    monkeypatch.setattr(cpu_prompt, "prefill_attention", lambda *args: "reference")
    q, k, v = torch.randn(3, 20, 2, 48)
    assert prompt_attention(q, k[:4], v[:4], k, v, 0.1) == "reference"
