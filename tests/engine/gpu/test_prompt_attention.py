"""Which implementation attends prompts, what it gives and what memory it says it takes."""

from __future__ import annotations

import sys
from itertools import accumulate
from types import ModuleType
from typing import Any

import pytest
import torch

from fourier_vllm.engine.gpu import prompt_attention
from fourier_vllm.engine.gpu.plan import Piece
from fourier_vllm.engine.gpu.prompt_attention import (
    TorchAttention,
    Xformers,
    choose,
    xformers_problem,
)
from fourier_vllm.kernels.reference.attention import prefill_attention
from tests.support.memory import peak_bytes

CPU = torch.device("cpu")


def pick(name: str) -> Any:
    return choose(name, 64, torch.float32, 0.125, CPU)


@pytest.fixture(autouse=True)
def _asked_anew():
    xformers_problem.cache_clear()
    yield
    xformers_problem.cache_clear()


@pytest.fixture
def xformers(monkeypatch):
    """A stand-in whose attention is set by the test."""

    class Mask:
        @classmethod
        def from_seqlens(cls, *args: Any, **kwargs: Any) -> Mask:
            return cls()

    names = ("xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias")
    modules = {name: ModuleType(name) for name in names}
    modules["xformers"].ops = modules["xformers.ops"]
    modules["xformers.ops.fmha.attn_bias"].BlockDiagonalCausalFromBottomRightMask = Mask
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules["xformers.ops"]


def test_without_xformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    assert isinstance(pick("auto"), TorchAttention)
    with pytest.raises(ValueError, match=r"needs xformers for .*, which cannot be imported"):
        pick("xformers")


def test_a_build_without_kernels_is_passed_over(xformers):
    """Built for another torch it imports, and fails at the first call."""

    def attention(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("No operator found")

    xformers.memory_efficient_attention = attention
    assert isinstance(pick("auto"), TorchAttention)
    with pytest.raises(ValueError, match="which has no kernels for this GPU") as caught:
        pick("xformers")
    assert "leave the option out" in str(caught.value)


def test_a_build_that_runs_is_taken(xformers):
    xformers.memory_efficient_attention = lambda q, k, v, **options: v
    assert isinstance(pick("auto"), Xformers)
    assert isinstance(pick("xformers"), Xformers)
    assert isinstance(pick("torch"), TorchAttention)


SCALE = 0.125
HEADS = [(4, 2), (6, 6), (3, 1)]  # of queries, of keys


def piece_of(query_lens: list[int], key_lens: list[int], *heads: int, dtype: Any) -> list[Any]:
    """A piece with random `q [T, Hq, 32]` and `k, v [K, H, 32]`, and an output."""
    (Hq, H), T, K = heads, sum(query_lens), sum(key_lens)
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, 32, generator=rng).to(dtype) for n, h in ((T, Hq), (K, H), (K, H)))
    return [Piece(0, slice(0, T), query_lens, key_lens), q, k, v, torch.full_like(q, torch.nan)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS)
def test_pytorch_attends_in_tiles(monkeypatch, heads, dtype):
    """Chunks that begin anywhere in a tile, longer and shorter than one, and padding."""
    monkeypatch.setattr(prompt_attention, "QUERY_TILE", 8)
    monkeypatch.setattr(prompt_attention, "KEY_TILE", 16)
    query_lens, key_lens = [5, 0, 37, 16, 1], [5, 0, 100, 16, 50]
    made = piece_of(query_lens, key_lens, *heads, dtype=dtype)
    q, k, v, out = made[1:]
    TorchAttention(SCALE)(*made)
    tokens, keys = [0, *accumulate(query_lens)], [0, *accumulate(key_lens)]
    for i, n in enumerate(query_lens):
        own = slice(tokens[i], tokens[i + 1])
        old, new = slice(keys[i], keys[i + 1] - n), slice(keys[i + 1] - n, keys[i + 1])
        if n:
            x = [y.float() for y in (q[own], k[old], v[old], k[new], v[new])]
            expected = prefill_attention(*x, SCALE)  # type: ignore[call-arg]
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(out[own].float(), expected, atol=tolerance, rtol=tolerance)


def test_what_is_held_is_measured():
    def work() -> None:
        for n in (1000, 3000, 2000):
            torch.empty(n, dtype=torch.uint8)

    assert peak_bytes(work) == 3000


@pytest.mark.parametrize("name", ["xformers", "torch"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_no_less_than_what_is_taken(xformers, name, heads, dtype):
    """And no more than twice as much, where queries and keys fill their tiles."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        dense = [x.contiguous() for x in (k, v)]  # one KV head is expanded as a view
        return torch.empty_like(q) if dense else q

    xformers.memory_efficient_attention = attend
    made = piece_of([512], [3000], *heads, dtype=dtype)
    attention = pick(name)
    peak, said = peak_bytes(lambda: attention(*made)), attention.memory(*made[1:3])
    assert peak <= said <= 2 * peak
