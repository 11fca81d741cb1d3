"""Which implementation attends prompts, where xformers is absent, useless or runs."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from fourier_vllm.engine.prompt_attention import (
    TorchAttention,
    Xformers,
    choose,
    xformers_problem,
)

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
