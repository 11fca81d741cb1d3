"""Attention of a prompt over itself, as the measured model computes it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fourier_vllm.calibration.statistics import from_pages
from fourier_vllm.engine.measure import watch
from fourier_vllm.window import pages_before
from tests.support.numerics import assert_close


def naive(q, k, v, scale, window):
    """One query at a time, float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    out = torch.empty_like(q, dtype=torch.float64)
    for t in range(len(q)):
        seen = slice(max(0, t + 1 - (window or t + 1)), t + 1)
        scores = torch.einsum("hd,thd->ht", q[t].double(), k[seen]) * scale
        out[t] = torch.einsum("ht,thd->hd", scores.softmax(-1), v[seen])
    return out


@pytest.mark.parametrize("window", [None, 1, 7, 33, 1000])
def test_attention(window, monkeypatch):
    monkeypatch.setattr(watch, "QUERIES_AT_ONCE", 16)
    q, k, v = torch.randn(77, 6, 40), torch.randn(77, 2, 40), torch.randn(77, 2, 40)
    assert_close("out", naive(q, k, v, 0.2, window), watch.attend(q, k, v, 0.2, window), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_pages_change(dtype, monkeypatch):
    monkeypatch.setattr(watch, "QUERIES_AT_ONCE", 16)
    q, k, v = (torch.randn(77, heads, 40).to(dtype) for heads in (6, 2, 2))
    paged = torch.randn(77, 2, 40).to(dtype), torch.randn(77, 2, 40).to(dtype)
    sizes = dict(page_size=8, local_window=13, sink_tokens=3)
    read = from_pages(torch.arange(77), 77, **sizes)
    found = watch.change_by_pages(q, (k, v), paged, read, 0.2)
    exact = naive(q, k, v, 0.2, None)
    pages_read = []
    for t in range(77):
        pages = pages_before(t + 1, 13, 8)
        pages_read.append(pages)
        mixed = [x.clone() for x in (k, v)]
        for x, y in zip(mixed, paged, strict=True):
            x[3 : 8 * pages] = y[3 : 8 * pages]
        keys, values = (x[: t + 1] for x in mixed)
        want = naive(q[: t + 1], keys, values, 0.2, None)[t] - exact[t]
        if pages == 0:
            assert not found[t].any()
        else:
            assert_close(f"query {t}", want, found[t], 1e-4)
    assert (min(pages_read), max(pages_read)) == (0, 8)


class Layer:
    """What the watch needs of vLLM's Attention."""

    num_heads, num_kv_heads, head_size = 4, 2, 8
    impl = SimpleNamespace(scale=0.3)

    def __init__(self, window=None):
        self.sliding_window = window

    def forward(self, *args):
        raise AssertionError("the layer's own forward ran")


def test_layers_are_watched_and_let_go():
    layers, seen = {"a": Layer(), "b": Layer(5)}, []

    def observe(name, q, k, v, out):
        seen.append((name, q.shape, k.shape, v.shape))
        return out + (name == "b")

    q, k, v = torch.randn(20, 32), torch.randn(20, 16), torch.randn(20, 16)
    with watch.watched(layers, observe):
        found = {name: x.forward(q, k, v) for name, x in layers.items()}
    split = q.view(20, 4, 8), k.view(20, 2, 8), v.view(20, 2, 8)
    assert_close("a", naive(*split, 0.3, None), found["a"].view(20, 4, 8), 1e-5)
    assert_close("b", naive(*split, 0.3, 5) + 1, found["b"].view(20, 4, 8), 1e-5)
    assert [x[0] for x in seen] == ["a", "b"]
    assert not any("forward" in vars(x) for x in layers.values())


def test_an_error_lets_layers_go():
    one = Layer()
    with pytest.raises(ZeroDivisionError), watch.watched({"a": one}, lambda *_: 1 / 0):
        one.forward(torch.randn(4, 32), torch.randn(4, 16), torch.randn(4, 16))
    assert "forward" not in vars(one)
