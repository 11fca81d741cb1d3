"""Hits from the CPU tier give stock's tokens with a lossless recipe, in every situation."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

from fourier_vllm.engine.cache.managers import FourierLocalManager
from fourier_vllm.engine.connectors import offload as connector
from tests.support.engine import (
    LOSSLESS,
    blocks_held_after_abort,
    count_preemptions,
    engine,
    generate,
    poison_free_blocks,
    prompts,
)
from tests.support.tier import copies_without_cuda, forget, hits, later_turns, offload

FEW = 2e-3  # GiB of a tier that cannot hold all pages


def offloading(
    model: Any,
    fourier: dict[str, Any],
    gib: float = 0.05,
    tier: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    return engine(model, fourier, **offload(gib, **tier or {}), **options)


@pytest.fixture(scope="module")
def stock(toy):
    with engine(toy()) as llm:
        return later_turns(llm)


@pytest.mark.parametrize(
    ("fourier", "options"),
    [
        pytest.param({}, {}, id="chunk-64"),
        pytest.param({}, {"max_num_batched_tokens": 512}, id="chunk-512"),
        pytest.param({"prefill": "exact"}, {}, id="exact"),
        pytest.param({"sink_tokens": 32, "local_block_size": 8}, {}, id="two-pinned-blocks"),
        pytest.param({"sink_tokens": 0, "local_window": 32}, {}, id="no-sinks"),
    ],
)
def test_tokens_equal_stock(toy, stock, fourier, options):
    with copies_without_cuda() as moved, offloading(toy(), LOSSLESS | fourier, **options) as llm:
        assert later_turns(llm) == stock
        assert hits(llm) > 1000
    assert min(moved.values()) > 30, moved


def test_stored_only_when_the_gpu_needs_the_room(toy, stock):
    pool = dict(num_gpu_blocks_override=40, max_model_len=512)
    with (
        copies_without_cuda() as moved,
        offloading(toy(), LOSSLESS, tier=dict(lazy_offload=True), **pool) as llm,
    ):
        assert later_turns(llm) == stock
    assert moved["stored"] > 10, moved


@pytest.mark.parametrize("capacity", [1 << 26, 1 << 21], ids=["all-fits", "full"])
@pytest.mark.parametrize("use_page_cache", [False, True], ids=["direct", "page-cache"])
def test_a_disk(toy, stock, tmp_path, capacity, use_page_cache):
    """vLLM's own reads and writes of its file, which nobody else can read."""
    file = tmp_path / "pages"
    disk = dict(
        kv_offload_backend="disk",
        disk_path=str(file),
        disk_capacity_bytes=capacity,
        use_page_cache=use_page_cache,
    )
    with copies_without_cuda() as moved, offloading(toy(), LOSSLESS, tier=disk) as llm:
        (found,) = tmp_path.iterdir()
        assert found.stat().st_mode & 0o077 == 0
        assert later_turns(llm) == stock
    assert min(moved.values()) > 5, moved


@pytest.mark.parametrize("late", [0, 3])
def test_free_blocks_are_never_read(toy, stock, late):
    with (
        copies_without_cuda(late) as moved,
        offloading(toy(), LOSSLESS) as llm,
        poison_free_blocks(llm),
    ):
        assert later_turns(llm) == stock
    assert min(moved.values()) > 30, moved


def test_raw_blocks_for_a_hit_are_noticed(toy, stock, monkeypatch):
    """Negative control: vLLM's own allocation puts blocks that nobody fills where pages should be read."""
    monkeypatch.delattr(FourierLocalManager, "allocate_external_computed_blocks")
    with copies_without_cuda(), offloading(toy(), LOSSLESS) as llm, poison_free_blocks(llm):
        assert later_turns(llm) != stock


def test_hits_go_on_behind_those_of_the_gpu(toy, stock, monkeypatch):
    """Negative control: pinned blocks are looked for where they are not, and the tier gives less."""
    found = []
    for is_told in (True, False):
        if not is_told:
            monkeypatch.setattr(connector, "lookup_behind", lambda _: nullcontext())
        with copies_without_cuda() as moved, offloading(toy(), LOSSLESS) as llm:
            assert later_turns(llm) == stock
        found.append(moved["loaded"])
    assert found[1] < found[0]


@pytest.mark.parametrize("late", [0, 2])
def test_preemption(toy, stock, late):
    pool = dict(num_gpu_blocks_override=30, max_model_len=512)
    with (
        count_preemptions() as count,
        copies_without_cuda(late) as moved,
        offloading(toy(), LOSSLESS, **pool) as llm,
    ):
        assert later_turns(llm) == stock
    assert count[0] > 0
    assert min(moved.values()) > 10, moved


def test_a_full_tier(toy, stock):
    with copies_without_cuda() as moved, offloading(toy(), LOSSLESS, gib=FEW) as llm:
        assert later_turns(llm) == stock
    assert min(moved.values()) > 5, moved


def test_abort_in_a_transfer(toy, stock):
    with copies_without_cuda(late=4), offloading(toy(), LOSSLESS) as llm:
        generate(llm, prompts(), 8)
        forget(llm)
        blocks_held_after_abort(llm)
        forget(llm)
        assert later_turns(llm) == stock
