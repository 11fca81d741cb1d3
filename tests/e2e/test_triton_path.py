"""The engine on a CPU with the GPU's path, its kernels in Triton's interpreter: stock attention's tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.e2e.engine import KERNELS_LOSSLESS, engine, generate, poison_free_blocks, prompts, tokens
from tests.triton_kernels import DEVICE, needs_triton

pytestmark = [
    needs_triton,
    pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU test_gpu_engine.py runs them compiled"),
]

# The interpreter copies whole caches for every launch.
SMALL = dict(num_gpu_blocks_override=40, max_model_len=512)


@pytest.fixture
def on_the_gpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.workspace import init_workspace_manager, reset_workspace_manager

    from fourier_vllm.engine import prefill
    from fourier_vllm.engine.backend import FourierImpl

    monkeypatch.setattr(prefill, "KEYS_AT_ONCE", 512)
    monkeypatch.setattr(FourierImpl, "has_kernels", staticmethod(lambda device: True))
    # vLLM's workspace is there, and grows, on accelerators only.
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    reset_workspace_manager()
    init_workspace_manager(torch.device("cpu"))


def turns(llm: Any) -> list[list[int]]:
    """A prompt in chunks beside a decoding one, then a second turn that hits the first one's pages."""
    short, long = prompts()[1], prompts()[6]
    first = tokens(generate(llm, [short, long], 5))
    return first + tokens(generate(llm, [long + first[1] + [7, 8, 9]], 2))


@pytest.fixture(scope="module")
def stock(toy):
    with engine(toy()) as llm:
        return turns(llm)


@pytest.mark.parametrize("prefill", ["windowed", "exact"])
def test_tokens_equal_stock(toy, stock, on_the_gpu_path, prefill):
    fourier = KERNELS_LOSSLESS | {"prefill": prefill}
    with engine(toy(), fourier, **SMALL) as llm, poison_free_blocks(llm):
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        assert layers["model.layers.0.self_attn.attn"].impl.gpu is not None
        assert turns(llm) == stock
