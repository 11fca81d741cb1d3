"""What a prefix-cache hit takes of both caches."""

from __future__ import annotations

import pytest
from vllm.v1.request import Request

from tests.support.pool import MODES, NO_SINKS, Pool, prompt
from tests.support.stamps import LOCAL_GROUP, PAGE_GROUP
from tests.support.traffic import WINDOWED


def hit(pool: Pool, ids: list[int]) -> tuple[int, list[bool]]:
    """Length of the hit, and which of its raw blocks are there."""
    request = pool.request("probe", ids)
    blocks, length, _ = pool.manager.get_computed_blocks(request)
    local = blocks.blocks[LOCAL_GROUP]
    assert len(blocks.blocks[PAGE_GROUP]) * pool.window.page_size == length
    assert len(local) * pool.window.block_size == length
    return length, [not b.is_null for b in local]


def evict(pool: Pool, request: Request, group: int, indices) -> None:
    """Drop blocks of a live request from the prefix cache."""
    blocks = pool.manager.get_blocks(request.request_id).blocks[group]
    chosen = {blocks[i].block_id for i in indices}
    assert 0 not in chosen
    pool.pool.evict_blocks(chosen)


@pytest.mark.parametrize("extra", [0, 1, 31, 32])
def test_hits_are_whole_pages(config, extra):
    """And take the pinned block; the raw tokens between it and the end of the hit are in the pages."""
    pool = Pool(config(), WINDOWED, 400)
    request = pool.request("a", prompt(200))
    assert pool.prefill(request, lambda: 50)
    # Pages up to 192; the last token is always computed again.
    shared = 128 + extra
    length, real = hit(pool, prompt(200)[:shared] + [1] * (256 - shared))
    assert length == shared // 32 * 32
    assert [i for i, x in enumerate(real) if x] == [0]
    assert hit(pool, prompt(192))[0] == 160
    assert hit(pool, prompt(193))[0] == 192


@pytest.mark.parametrize("mode", MODES)
def test_only_pinned_blocks_are_cached(config, mode):
    """A raw block takes an id that would hold a page: the window never crowds pages out."""
    window = MODES[mode]
    pool = Pool(config(), window, 400)
    request = pool.request("a", prompt(200))
    assert pool.prefill(request, lambda: 50)
    assert pool.decode(request, 330)
    pool.free(request)
    cached = sum(b.block_hash is not None for b in pool.pool.blocks)
    assert cached == 330 // window.page_size + window.num_pinned_blocks


def test_what_is_freed_before_it_is_computed_is_not_hit(config):
    """A priority victim of the step that scheduled it; stock vLLM hits its blocks."""
    pool = Pool(config(), WINDOWED, 400)
    request = pool.request("a", prompt(200))
    assert pool.advance(request, 96)
    assert pool.manager.allocate_slots(request, 96)
    assert hit(pool, prompt(200))[0] == 192
    pool.free(request)
    assert hit(pool, prompt(200))[0] == 96
    request = pool.request("b", prompt(200, seed=1))
    assert pool.manager.allocate_slots(request, 96)
    pool.free(request)
    assert hit(pool, prompt(200, seed=1)) == (0, [])
    assert sum(b.block_hash is not None for b in pool.pool.blocks) == 96 // 32 + 1


def test_no_hit_without_the_pinned_block(config):
    pool = Pool(config(), WINDOWED, 400)
    request = pool.request("a", prompt(200))
    assert pool.prefill(request, lambda: 200)
    evict(pool, request, LOCAL_GROUP, [0])
    assert hit(pool, prompt(200)) == (0, [])


def test_no_pin_without_sinks(config):
    pool = Pool(config(), NO_SINKS, 400)
    request = pool.request("a", prompt(200))
    assert pool.prefill(request, lambda: 100)
    length, real = hit(pool, prompt(200))
    assert length == 192
    assert not any(real)


def test_hit_ends_at_a_missing_page(config):
    pool = Pool(config(), WINDOWED, 400)
    request = pool.request("a", prompt(200))
    assert pool.prefill(request, lambda: 200)
    evict(pool, request, PAGE_GROUP, [3])
    length, real = hit(pool, prompt(200))
    assert (length, real) == (96, [i == 0 for i in range(6)])


def test_evicted_blocks_go_oldest_last(config):
    """Freed with the newest first: when room is needed, the start of a prefix survives longest."""
    pool = Pool(config(), WINDOWED, 40)
    request = pool.request("a", prompt(200))
    assert pool.prefill(request, lambda: 50)
    pool.free(request)
    lengths = []
    for taken in range(0, 39, 3):
        blocks = pool.pool.get_new_blocks(taken)
        lengths.append(hit(pool, prompt(200))[0])
        pool.pool.free_blocks(blocks)
    assert lengths[0] == 192
    assert lengths == sorted(lengths, reverse=True)
