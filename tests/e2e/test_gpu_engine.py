"""The engine on a GPU: lossless pages give stock attention's tokens, eager and as CUDA graphs."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from fourier_vllm.engine.gpu.prompt_attention import xformers_problem
from tests.support.engine import (
    KERNELS_LOSSLESS,
    blocks_held_after_abort,
    conversation,
    count_preemptions,
    digest,
    engine,
    generate,
    generate_on_replicas,
    poison_free_blocks,
    prompts,
    tokens,
)
from tests.support.tier import hits, later_turns, offload

pytestmark = pytest.mark.gpu
# Otherwise stock attention multiplies float32 with 10 bits, and near ties of a random model fall either way.
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")

GPU = dict(
    kernel_config={"enable_flashinfer_autotune": False},
    kv_cache_memory_bytes=256 << 20,
    gpu_memory_utilization=0.1,
)
GRAPHS = dict(
    enforce_eager=False,
    compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
)


def run(model: Any, fourier: dict[str, Any] | None, **options: Any) -> list[list[int]]:
    if fourier is None:
        options |= {"attention_backend": "TRITON_ATTN"}  # the one that attends float32
    with engine(model, fourier, **GPU | options) as llm:
        return conversation(llm)


@pytest.fixture(scope="module")
def stock(toy):
    return run(toy(), None)


@pytest.fixture
def same(record_property):
    """Asserts that tokens equal stock's; both are recorded for benchmarks/trust.py."""

    def check(ours: list[list[int]], stock: list[list[int]]) -> None:
        record_property("stock", digest(stock))
        record_property("ours", digest(ours))
        assert ours == stock

    return check


@pytest.mark.parametrize(
    ("fourier", "options"),
    [
        pytest.param({}, {}, id="eager"),
        pytest.param({}, GRAPHS, id="graphs"),
        pytest.param({}, GRAPHS | {"enable_prefix_caching": False}, id="graphs-no-prefix-cache"),
        pytest.param({"prefill": "exact"}, GRAPHS, id="exact"),
        pytest.param({}, GRAPHS | {"async_scheduling": False}, id="no-async-scheduling"),
        pytest.param({}, {"enforce_eager": False}, id="compiled"),
    ],
)
def test_tokens_equal_stock(toy, stock, same, fourier, options):
    same(run(toy(), KERNELS_LOSSLESS | fourier, **options), stock)


@pytest.mark.parametrize(("prefill", "blocks"), [("windowed", 24), ("exact", 22)])
def test_preemption_and_recompute(toy, stock, same, prefill, blocks):
    pool = dict(num_gpu_blocks_override=blocks, max_model_len=512)
    with count_preemptions() as count:
        same(run(toy(), KERNELS_LOSSLESS | {"prefill": prefill}, **GRAPHS, **pool), stock)
    assert count[0] > 0


@pytest.mark.parametrize("family", ["llama-mqa", "llama-wide", "qwen3", "gemma3"])
def test_families(toy, same, family):
    model = toy(family)
    same(run(model, KERNELS_LOSSLESS, **GRAPHS), run(model, None))


def test_samples_and_abort(toy, same):
    """Three samples a prompt; then requests that are given up leave nothing behind."""
    results = []
    for fourier in (None, KERNELS_LOSSLESS):
        backend = {} if fourier else {"attention_backend": "TRITON_ATTN"}
        with engine(toy(), fourier, **GPU | GRAPHS | backend) as llm:
            outputs = generate(llm, prompts()[:4], 80, n=3, temperature=0.8, seed=11)
            results.append(tokens(outputs))
            if fourier:
                assert blocks_held_after_abort(llm) == 0
    same(results[1], results[0])


@pytest.mark.parametrize("options", [{}, GRAPHS], ids=["eager", "graphs"])
def test_hits_from_cpu_memory(toy, same, options):
    """Pages that went down to CPU memory and came back, into blocks that held NaN."""
    with engine(toy(), None, **GPU | {"attention_backend": "TRITON_ATTN"}) as llm:
        stock = later_turns(llm)
    with (
        engine(toy(), KERNELS_LOSSLESS, **GPU | options | offload()) as llm,
        poison_free_blocks(llm),
    ):
        same(later_turns(llm), stock)
        assert hits(llm) > 1000


@pytest.mark.parametrize("early", [0, 112])
def test_free_blocks_are_never_read(toy, stock, monkeypatch, early):
    """And a negative control: freed `early` tokens before their time, they are."""
    from fourier_vllm.engine.cache.managers import FourierLocalManager

    original = FourierLocalManager._first_kept
    monkeypatch.setattr(
        FourierLocalManager, "_first_kept", lambda self, n: original(self, n + early)
    )
    with (
        engine(toy(), KERNELS_LOSSLESS, enable_prefix_caching=False, **GPU) as llm,
        poison_free_blocks(llm),
    ):
        assert (conversation(llm) == stock) == (early == 0)


def prompt_logprobs(model: Any, fourier: dict[str, Any] | None, **options: Any) -> torch.Tensor:
    """Of a prompt of 300 tokens, computed in chunks of 64."""
    with engine(model, fourier, **GPU | options) as llm:
        (output,) = generate(llm, prompts()[3:4], 1, prompt_logprobs=0)
    return torch.tensor([next(iter(x.values())).logprob for x in output.prompt_logprobs[1:]])


@pytest.fixture(scope="module")
def half_precision(toy):
    """What attention in float32 gives, and by how much stock attention in 16 bits differs from it."""
    model = toy("llama-mqa")
    exact = prompt_logprobs(model, None, attention_backend="TRITON_ATTN")
    dtypes = ("bfloat16", "float16")
    return exact, {x: rms(prompt_logprobs(model, None, dtype=x) - exact) for x in dtypes}


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("prompt_attention", ["flash", "xformers", "torch"])
@pytest.mark.parametrize("prefill", ["windowed", "exact"])
def test_prompts_in_half_precision(toy, half_precision, prefill, prompt_attention, dtype):
    """Lossless pages add no error that counts beside the rounding of 16-bit models."""
    if prompt_attention == "xformers":
        problem = xformers_problem(64, getattr(torch, dtype), torch.device("cuda"))
        if problem:
            pytest.skip(f"xformers {problem}")
    exact, stock_error = half_precision
    options = {"prefill": prefill, "prompt_attention": prompt_attention}
    found = prompt_logprobs(toy("llama-mqa"), KERNELS_LOSSLESS | options, dtype=dtype)
    assert rms(found - exact) < 1.5 * stock_error[dtype]


@pytest.mark.parametrize("split", [dict(tensor_parallel_size=2), dict(pipeline_parallel_size=2)])
def test_two_gpus(toy, stock, same, split):
    needs_two_gpus()
    same(run(toy(), KERNELS_LOSSLESS, **GRAPHS, **split), stock)


def test_replicas_on_two_gpus(toy, stock):
    needs_two_gpus()
    found = generate_on_replicas(toy(), KERNELS_LOSSLESS, prompts(), 64, **GPU | GRAPHS)
    assert found == stock[: len(found)]


def needs_two_gpus() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
