"""The engine on a CPU with the GPU's path, its kernels in Triton's interpreter: stock attention's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support.engine import (
    KERNELS_LOSSLESS,
    engine,
    generate,
    poison_free_blocks,
    prompts,
    sleep_and_reload,
    tokens,
)
from tests.support.triton_kernels import DEVICE, needs_triton

pytestmark = [
    needs_triton,
    pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU test_gpu_engine.py runs them compiled"),
]

# The interpreter copies whole caches for every launch.
SMALL = dict(num_gpu_blocks_override=40, max_model_len=512)
# Smaller pages, smaller ids. A prompt at once: the interpreter's time is that of launches.
SLEEPY = dict(num_gpu_blocks_override=60, max_model_len=192, max_num_batched_tokens=192)


@pytest.fixture
def on_the_gpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.workspace import init_workspace_manager, reset_workspace_manager

    from fourier_vllm.engine.backend import FourierImpl
    from fourier_vllm.engine.gpu import prompts as prefill

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
        path = layers["model.layers.0.self_attn.attn"].impl.bound.path
        assert type(path).__name__ == "GpuPath"
        assert turns(llm) == stock


def tensors_in(thing: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Tensors that an object, and what it holds, keep."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict | list | tuple):
        for x in thing.values() if isinstance(thing, dict) else thing:
            yield from tensors_in(x, seen)
    elif type(thing).__module__.startswith("fourier_vllm"):
        yield from tensors_in(vars(thing), seen)


class Memory:
    """A GPU's memory: what a level of sleep does not keep is lost."""

    def __init__(self, worker: Any) -> None:
        runner = worker.model_runner
        layers = runner.compilation_config.static_forward_context.values()
        seen: set[int] = set()
        self.layers = [layer for layer in layers if hasattr(layer, "impl")]
        self.ours = [x for layer in self.layers for x in tensors_in(layer.impl.bound.path, seen)]
        self.weights = [*runner.model.parameters(), *runner.model.buffers(), *self.ours]
        self.caches = [layer.kv_cache for layer in layers]

    def suspend(self, level: int = 1) -> None:
        for cache in self.caches:
            cache.view(torch.uint8).fill_(0xFF)
        if level == 2:
            for x in self.weights:
                x.data.zero_()

    def resume(self, tags: list[str] | None = None) -> None:
        pass


def sleep_backend_of(memory: Memory) -> Any:
    """`memory` as vLLM's worker takes it."""
    from vllm.device_allocator.sleep_mode_backend import SleepModeBackend

    class Backend(SleepModeBackend):
        suspend, resume = memory.suspend, memory.resume

    return Backend()


def test_sleep_and_reload(toy, on_the_gpu_path, monkeypatch):
    """Level 2 loses what was made while weights loaded, unless it is a buffer of the model."""
    # Changes the process it is imported in: on a GPU no engine starts there afterwards.
    from vllm.v1.worker.cpu_worker import CPUWorker

    for name in ("sleep", "wake_up"):  # instead of these a GPU's, from which they are inherited
        monkeypatch.delattr(CPUWorker, name)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *args: None)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda *args: (0, 0))
    with engine(toy(), KERNELS_LOSSLESS | {"target": "balanced"}, **SLEEPY) as llm:
        worker = llm.llm_engine.model_executor.driver_worker.worker
        memory = Memory(worker)
        worker._sleep_mode_backend = sleep_backend_of(memory)
        saved = {id(x) for x in worker.model_runner.model.buffers()}
        assert memory.ours
        assert {id(x) for x in memory.ours} <= saved

        def answer() -> tuple[list[list[int]], float]:
            outputs = generate(llm, [prompts()[6][:150]], 2)
            likelihood = outputs[0].outputs[0].cumulative_logprob
            return tokens(outputs), round(likelihood, 3)

        before = answer()
        llm.sleep(1)
        llm.wake_up()
        assert answer() == before
        sleep_and_reload(llm)
        assert answer() == before
        # A negative control: were they no buffers, the tables would be gone.
        for layer in memory.layers:
            layer._buffers = {k: x for k, x in layer._buffers.items() if "fourier" not in k}
        sleep_and_reload(llm)
        assert answer() != before
