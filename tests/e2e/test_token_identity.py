"""With a lossless recipe the engine's tokens equal stock attention's, in every situation."""

from __future__ import annotations

import pytest

from tests.support.engine import (
    LOSSLESS,
    blocks_held_after_abort,
    conversation,
    count_preemptions,
    engine,
    generate,
    poison_free_blocks,
    prompts,
    tokens,
)
from tests.support.toys import FAMILIES


@pytest.fixture(scope="module")
def stock(toy):
    with engine(toy()) as llm:
        return conversation(llm)


@pytest.mark.parametrize(
    ("fourier", "options"),
    [
        pytest.param({}, {}, id="chunk-64"),
        pytest.param({}, {"max_num_batched_tokens": 512}, id="chunk-512"),
        pytest.param({"prefill": "exact"}, {}, id="exact-chunk-64"),
        pytest.param({"prefill": "exact"}, {"max_num_batched_tokens": 300}, id="exact-chunk-300"),
        pytest.param({}, {"enable_prefix_caching": False}, id="no-prefix-cache"),
        pytest.param(
            {"page_size": 64, "local_window": 16, "sink_tokens": 4},
            {"max_num_batched_tokens": 48},
            id="page-64-chunk-48",
        ),
        pytest.param({"sink_tokens": 0, "local_window": 32}, {}, id="no-sinks"),
        pytest.param({"sink_tokens": 32, "local_block_size": 8}, {}, id="two-pinned-blocks"),
    ],
)
def test_tokens_equal_stock(toy, stock, fourier, options):
    with engine(toy(), LOSSLESS | fourier, **options) as llm:
        assert conversation(llm) == stock


@pytest.mark.parametrize(("prefill", "blocks"), [("windowed", 30), ("exact", 36)])
def test_preemption_and_recompute(toy, stock, prefill, blocks):
    pool = dict(num_gpu_blocks_override=blocks, max_model_len=512)
    fourier = LOSSLESS | {"prefill": prefill}
    with count_preemptions() as count, engine(toy(), fourier, **pool) as llm:
        assert conversation(llm) == stock
    assert count[0] > 0


@pytest.mark.parametrize("prefill", ["windowed", "exact"])
def test_free_blocks_are_never_read(toy, stock, prefill):
    with (
        engine(toy(), LOSSLESS | {"prefill": prefill}, enable_prefix_caching=False) as llm,
        poison_free_blocks(llm),
    ):
        assert conversation(llm) == stock


def test_a_short_window_is_noticed(toy, stock, monkeypatch):
    """Negative control: the checks above fail when blocks are freed too early."""
    from fourier_vllm.engine.cache.managers import FourierLocalManager

    original = FourierLocalManager._first_kept
    monkeypatch.setattr(FourierLocalManager, "_first_kept", lambda self, n: original(self, n + 48))
    with engine(toy(), LOSSLESS, enable_prefix_caching=False) as llm, poison_free_blocks(llm):
        assert conversation(llm) != stock


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("llama", "llama-128")])
def test_families(toy, family):
    results = []
    for fourier in (None, LOSSLESS):
        with engine(toy(family), fourier) as llm:
            results.append(tokens(generate(llm, prompts()[2:], 60)))
    assert results[0] == results[1]


def test_a_local_window_like_the_models_own(toy):
    """With a page, 64 tokens, as the sliding window of the other layers: each keeps its own manager."""
    results = []
    for fourier in (None, LOSSLESS | {"local_window": 32}):
        with engine(toy("gemma3"), fourier) as llm:
            results.append(tokens(generate(llm, prompts()[2:], 40)))
    assert results[0] == results[1]


def test_parallel_sampling_and_logprobs(toy):
    results = []
    for fourier in (None, LOSSLESS):
        # Whole prompts: vLLM's CPU runner cannot take back a seeded sample of a partial chunk.
        with engine(toy(), fourier, max_num_batched_tokens=1024) as llm:
            outputs = generate(llm, prompts()[:4], 80, n=3, temperature=0.8, seed=11, logprobs=5)
            results.append(outputs)
    for ours, theirs in zip(results[1], results[0], strict=True):
        for a, b in zip(ours.outputs, theirs.outputs, strict=True):
            assert list(a.token_ids) == list(b.token_ids)
            for x, y in zip(a.logprobs, b.logprobs, strict=True):
                assert x.keys() == y.keys()
                assert all(abs(x[t].logprob - y[t].logprob) < 1e-3 for t in x)


def test_prompt_logprobs(toy):
    results = []
    for fourier in (None, LOSSLESS):
        with engine(toy(), fourier) as llm:
            (output,) = generate(llm, prompts()[3:4], 1, prompt_logprobs=0)
            results.append([next(iter(x.values())).logprob for x in output.prompt_logprobs[1:]])
    assert max(abs(a - b) for a, b in zip(*results, strict=True)) < 1e-3


def test_abort_frees_everything(toy, stock):
    with engine(toy(), LOSSLESS) as llm:
        assert blocks_held_after_abort(llm) == 0
        assert conversation(llm) == stock
