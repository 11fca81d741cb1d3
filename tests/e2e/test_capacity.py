"""Invariant 4: as many requests as vLLM reports really run at once, without preemption; and 5."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fourier_vllm.engine.start_log import logger
from tests.support.engine import count_preemptions, engine, generate, prompts, tokens

LENGTH, DECODED = 512, 70


@pytest.mark.parametrize("prefill", ["windowed", "exact"])
@pytest.mark.parametrize("target", ["balanced", "lossless"])
def test_reported_concurrency_is_real(toy, target, prefill):
    fourier = dict(target=target, prefill=prefill, page_size=64, local_window=64, sink_tokens=8)
    options: dict[str, Any] = dict(
        max_model_len=LENGTH, max_num_seqs=64, max_num_batched_tokens=256
    )
    options |= dict(num_gpu_blocks_override=300, enable_prefix_caching=False, dtype="bfloat16")
    with engine(toy(), fourier, **options) as llm:
        reported = int(llm.llm_engine.vllm_config.cache_config.kv_cache_max_concurrency)
        assert reported > 4
        most = 0
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        schedule = scheduler.schedule

        def watch(*args, **kwargs):
            nonlocal most
            result = schedule(*args, **kwargs)
            most = max(most, len(scheduler.running))
            return result

        scheduler.schedule = watch
        ids = [[3 + i] * (LENGTH - DECODED) for i in range(reported)]
        with count_preemptions() as count:
            outputs = generate(llm, ids, DECODED)
        assert count[0] == 0
        assert most == reported
        assert all(len(o.outputs[0].token_ids) == DECODED for o in outputs)


def test_capacity_against_stock(smollm2):
    """SmolLM2 at 8,192 tokens a request: at least 3.5x of stock in the same memory."""
    sizes = []
    fourier: dict[str, Any] | None
    for fourier in (None, {}):
        options = dict(dtype="bfloat16", max_model_len=8192, max_num_batched_tokens=4096)
        with engine(smollm2, fourier, kv_cache_memory_bytes=1 << 30, **options) as llm:
            sizes.append(llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens)
    assert sizes[1] >= 3.5 * sizes[0]


def test_log_says_what_vllm_serves(toy, monkeypatch):
    """Beside layers that are not compressed too; and that compression gains little there."""
    said: list[str] = []
    for level in ("info_once", "warning_once"):
        monkeypatch.setattr(logger, level, lambda line, *args: said.append(line % args))
    options = dict(dtype="bfloat16", max_num_batched_tokens=512)
    with engine(toy("gemma3"), {"page_size": 128}, **options) as llm:
        served = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    with engine(toy("gemma3"), **options) as llm:
        stock = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    (line,) = (line for line in said if line.startswith("fourier: recipe"))
    found = re.search(r"; ([\d,]+) tokens at .* would hold ([\d,]+) ", line)
    ours, plain = (int(x.replace(",", "")) for x in found.groups())
    assert ours == served
    assert plain == pytest.approx(stock, rel=0.2)  # whose sliding layers have other blocks on a CPU
    assert any(line.startswith("fourier: compression gains little here") for line in said)


def test_alone_and_in_a_batch(toy):
    """A lossy recipe gives a request the same tokens whatever runs beside it."""
    fourier = dict(target="balanced", page_size=32, local_window=48, sink_tokens=16)
    options = dict(max_num_batched_tokens=2048, enable_prefix_caching=False)
    with engine(toy(), fourier, **options) as llm:
        together = tokens(generate(llm, prompts(), 60))
        alone = [tokens(generate(llm, [p], 60))[0] for p in prompts()]
    assert together == alone
