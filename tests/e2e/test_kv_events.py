"""A router that follows the engine's KV events knows what each prompt will find, and in which tier."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
from vllm.distributed import kv_events

from tests.support.engine import LOSSLESS, engine, generate, prompts, tokens
from tests.support.tier import copies_without_cuda, forget, offload

PAGES = "full_attention"
EVENTS = {"kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"}}
SOURCES = "vllm:prompt_tokens_cached_by_source"


class Router:
    """The blocks that events say are there, by medium and cache group."""

    def __init__(self, is_told_of_removals: bool = True) -> None:
        self.is_told = is_told_of_removals
        self.stored: dict[str, set[tuple[int, Any]]] = {"GPU": set(), "CPU": set()}
        # Hashes of pages by what is in front of them and their tokens, as a router learns them.
        self.hashes: dict[tuple[Any, tuple[int, ...]], tuple[int, Any]] = {}
        self.page_size = 0

    def hear(self, batch: Any) -> None:
        for event in batch.events:
            match event:
                case kv_events.BlockStored():
                    self._store(event)
                case kv_events.BlockRemoved() if self.is_told:
                    gone = {(event.group_idx, x) for x in event.block_hashes}
                    self.stored[event.medium] -= gone
                case kv_events.AllBlocksCleared():  # of the GPU: the connector is not reset
                    self.stored["GPU"].clear()

    def _store(self, event: Any) -> None:
        assert len(event.token_ids) == len(event.block_hashes) * event.block_size
        assert event.block_hashes
        self.stored[event.medium] |= {(event.group_idx, x) for x in event.block_hashes}
        if event.kv_cache_spec_kind != PAGES:
            return
        self.page_size, before = event.block_size, event.parent_block_hash
        for i, name in enumerate(event.block_hashes):
            ids = event.token_ids[i * event.block_size : (i + 1) * event.block_size]
            self.hashes[before, tuple(ids)] = (event.group_idx, name)
            before = name

    def expected_hit(self, ids: list[int]) -> int:
        """Tokens of a prompt that are in some tier."""
        there = self.stored["GPU"] | self.stored["CPU"]
        hit, before, size = 0, None, self.page_size or 1
        while hit + size < len(ids):  # the last token is always computed
            page = self.hashes.get((before, tuple(ids[hit : hit + size])))
            if page not in there:
                break
            hit, before = hit + size, page[1]
        return hit


def followed(llm: Any, router: Router) -> list[tuple[int, int]]:
    """Hits of prompts in turn, over and over: what the router expects, and what there was."""
    found, ids = [], prompts() + prompts(seed=1)
    for prompt in [*ids, *ids[::-1], *ids, *(x[:-40] + [9] * 50 for x in ids if len(x) > 100)]:
        expected = router.expected_hit(prompt)
        (output,) = generate(llm, [prompt], 40)
        found.append((expected, output.num_cached_tokens))
    return found


@pytest.mark.parametrize("blocks", [None, 30], ids=["room", "evictions"])
@pytest.mark.parametrize("has_tier", [False, True], ids=["gpu", "tier"])
def test_hits_are_what_events_say(toy, monkeypatch, blocks, has_tier):
    router = Router()
    monkeypatch.setattr(kv_events.NullEventPublisher, "publish", lambda _, x: router.hear(x))
    options = dict(num_gpu_blocks_override=blocks, max_model_len=512) | EVENTS
    tier = copies_without_cuda() if has_tier else nullcontext()
    with tier, engine(toy(), LOSSLESS, **options, **(offload() if has_tier else {})) as llm:
        found = followed(llm, router)
    assert [x for x, _ in found] == [y for _, y in found]
    assert sum(y for _, y in found) > 2000


def test_forgotten_removals_are_noticed(toy, monkeypatch):
    """Negative control: a router that hears nothing of evictions expects too much."""
    router = Router(is_told_of_removals=False)
    monkeypatch.setattr(kv_events.NullEventPublisher, "publish", lambda _, x: router.hear(x))
    with engine(toy(), LOSSLESS, num_gpu_blocks_override=30, max_model_len=512, **EVENTS) as llm:
        found = followed(llm, router)
    assert any(x > y for x, y in found)


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_metrics_name_the_tier(toy, tmp_path, kind):
    disk = dict(kv_offload_backend="disk", disk_path=str(tmp_path / "pages"), use_page_cache=True)
    options = offload(**disk) if kind == "disk" else offload()
    ids = prompts()[3:4]
    with copies_without_cuda(), engine(toy(), LOSSLESS, **options) as llm:
        first = tokens(generate(llm, ids, 8))
        assert tokens(generate(llm, ids, 8)) == first  # from the GPU
        forget(llm)
        assert tokens(generate(llm, ids, 8)) == first  # from the tier
        found = {m.labels["source"]: m.value for m in llm.get_metrics() if m.name == SOURCES}
    tier = "disk" if kind == "disk" else "host"
    assert {source for source, value in found.items() if value} == {"device", tier}
    assert found["device"] == found[tier] == 288
