"""Sleep and reload on a GPU: the tokens from before, whatever the memory that comes back holds.

vLLM's allocator for sleep takes one engine a process, so that each has its own.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch

from tests.e2e.test_gpu_engine import GPU, GRAPHS
from tests.support.engine import KERNELS_LOSSLESS, conversation, digest, engine, sleep_and_reload

pytestmark = pytest.mark.gpu
BALANCED = KERNELS_LOSSLESS | {"target": "balanced"}
COMPILED = dict(enforce_eager=False)
LOST = "without tables"


def scrub_discarded_memory(backend: Any, byte: int) -> None:
    """Let what sleep gave up come back as zeros where weights lay, as `byte` elsewhere."""
    from vllm.device_allocator.cumem import CuMemAllocator, libcudart

    resume, allocations = backend.resume, CuMemAllocator.get_instance().pointer_to_data

    def scrubbed(tags: list[str] | None = None) -> None:
        lost = {
            address: x
            for address, x in allocations.items()
            if x.is_asleep and x.cpu_backup_tensor is None
        }
        resume(tags)
        for address, x in lost.items():
            if not x.is_asleep:
                libcudart.cudaMemset(address, 0 if x.tag == "weights" else byte, x.handle[1])
        torch.cuda.synchronize()

    backend.resume = scrubbed


def conversations(
    model: Any, fourier: dict[str, Any] | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Tokens of one engine by what it went through before."""
    if fourier is None:
        options = options | {"attention_backend": "TRITON_ATTN"}  # the one that attends float32
    with engine(model, fourier, enable_sleep_mode=True, **GPU | options) as llm:
        worker = llm.llm_engine.model_executor.driver_worker.worker
        # Only caches that our kernels read hold NaN.
        scrub_discarded_memory(worker.sleep_mode_backend, 0 if fourier is None else 0xFF)
        found: dict[str, Any] = {"start": conversation(llm)}
        llm.sleep(level=1)
        llm.wake_up()
        found["level 1"] = conversation(llm)
        sleep_and_reload(llm)
        found["level 2"] = conversation(llm)
        llm.sleep(level=2)
        llm.wake_up()
        llm.collective_rpc("reload_weights")
        found["level 2, woken at once"] = conversation(llm)
        if (
            fourier == KERNELS_LOSSLESS
        ):  # without tables, lossy pages are NaN, which no sampler survives
            forget_tables(worker.model_runner.model)
            sleep_and_reload(llm)
            found[LOST] = conversation(llm)
    return found


def forget_tables(model: Any) -> None:
    """Take the kernels' tables from the model's buffers, which level 2 restores."""
    for layer in model.modules():
        for name in [x for x in layer._buffers if x.startswith("fourier_")]:
            del layer._buffers[name]


def in_own_process(*arguments: Any) -> dict[str, Any]:
    from vllm.platforms import current_platform

    if not current_platform.is_cumem_allocator_available():
        pytest.skip("this vLLM has no allocator for sleep")
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(conversations, *arguments).result()


@pytest.fixture(scope="module")
def stock(toy):
    return in_own_process(toy(), None, GRAPHS)


@pytest.mark.parametrize(
    ("fourier", "options"),
    [
        pytest.param(KERNELS_LOSSLESS, {}, id="lossless-eager"),
        pytest.param(KERNELS_LOSSLESS, GRAPHS, id="lossless-graphs"),
        pytest.param(BALANCED, GRAPHS, id="balanced-graphs"),
        pytest.param(BALANCED, COMPILED, id="balanced-compiled"),
    ],
)
def test_tokens_after_sleep(toy, stock, fourier, options, record_property):
    found = in_own_process(toy(), fourier, options)
    slept = [x for x in found if x.startswith("level")]
    for name, tokens in (("stock", stock), ("ours", found)):
        record_property(name, ", ".join(digest(tokens[x]) for x in ("start", *slept)))
    assert all(stock[x] == stock["start"] for x in slept)
    assert all(found[x] == found["start"] for x in slept)
    assert found["start"] == stock["start"] or fourier is BALANCED
    # A negative control: were the tables no buffers, level 2 would lose them.
    assert found.get(LOST) != found["start"]
