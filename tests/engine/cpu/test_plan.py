"""What a step reads and writes, through vLLM's own scheduler and block managers (invariant 3)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fourier_vllm.engine.cache.managers import FourierLocalManager
from fourier_vllm.engine.cpu.plan import plan_tokens, raw_starts
from tests.support.scheduling import Engine, engine_config
from tests.support.stamps import ReadError
from tests.support.traffic import EXACT, MAX_MODEL_LEN, WINDOWED, simulate


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Maker of engine configurations; each call gives a fresh one."""
    folder = tmp_path_factory.mktemp("model")

    def make(max_num_seqs: int = 4, max_num_batched_tokens: int = 96):
        return engine_config(
            folder,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )

    return make


@pytest.mark.parametrize("in_flight", [pytest.param(1, id="sync"), pytest.param(2, id="async")])
@pytest.mark.parametrize("cache", [pytest.param(True, id="cache"), pytest.param(False, id="none")])
@pytest.mark.parametrize("window", [WINDOWED, EXACT], ids=["windowed", "exact"])
def test_every_read_is_right(config, window, cache, in_flight):
    hits = 0
    for runner in ("v1", "v2"):
        engine = simulate(
            config, window, prefix_caching=cache, in_flight=in_flight, runner=runner, seed=in_flight
        )
        hits += engine.num_hits
    assert bool(hits) == cache


@pytest.mark.parametrize("in_flight", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("window", "num_blocks"), [(WINDOWED, 40), (EXACT, 50)], ids=["windowed", "exact"]
)
def test_when_the_pool_is_tight(config, window, num_blocks, in_flight):
    """Cached blocks are evicted all the time and requests preempted; gaps are read from pages."""
    preemptions = 0
    for seed, runner in enumerate(("v1", "v2")):
        engine = simulate(
            config,
            window,
            seed=seed,
            num_blocks=num_blocks,
            in_flight=in_flight,
            runner=runner,
            max_tokens=(140,),
            disturb=False,
        )
        preemptions += engine.num_preemptions
    assert preemptions


def test_a_victim_of_the_step_that_scheduled_it(tmp_path):
    """Its pages are not hit: nobody computes them."""
    most = 0
    for free in range(6):
        config = engine_config(
            tmp_path,
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=96,
            scheduling_policy="priority",
            long_prefill_token_threshold=70,
        )
        engine = Engine(config, WINDOWED, 200)
        engine.add("long", list(range(400)), 5, priority=1)
        engine.step()
        urgent = engine.add("urgent", [1] * 15, 60)
        # Room for the long prompt's chunk, and none for the urgent request's next block.
        while urgent.num_computed_tokens != 16:
            engine.step()
        engine.squeeze(free)
        engine.step()
        most = max(most, engine.num_preemptions)
        engine.release()
        engine.run()
    assert most == 1


def test_missing_retention_is_noticed(config, monkeypatch):
    """Negative control: exact prefill, and the window moves while the prompt is computed."""
    original = FourierLocalManager.remove_skipped_blocks

    def forgetful(self, request_id, *args, **kwargs):
        self._prefill_tokens.pop(request_id, None)
        original(self, request_id, *args, **kwargs)

    monkeypatch.setattr(FourierLocalManager, "remove_skipped_blocks", forgetful)
    with pytest.raises(ReadError):
        simulate(config, EXACT, prefix_caching=False, num_blocks=70)


# context, prefilling, null blocks, windowed start, exact start; W = 32, L = 48, bs = 16, one pin
STARTS = [
    pytest.param(0, True, [], 0, 0, id="first-token"),
    pytest.param(78, False, [], 0, 0, id="last-before-a-page-leaves"),
    pytest.param(79, False, [], 32, 32, id="first-page-leaves"),
    pytest.param(110, False, [], 32, 32, id="last-of-one-page"),
    pytest.param(111, False, [], 64, 64, id="two-pages"),
    pytest.param(200, True, [], 128, 0, id="prefilling"),
    pytest.param(200, True, [1, 2, 3], 128, 64, id="null-blocks-from-a-hit"),
    pytest.param(200, True, [1], 128, 32, id="gap-ends-inside-a-page"),
    pytest.param(200, True, range(1, 12), 192, 192, id="everything-null"),
    pytest.param(200, True, [9], 160, 160, id="null-inside-the-window"),
    pytest.param(200, False, range(1, 8), 128, 128, id="nulls-below-the-window"),
    pytest.param(200, False, [8], 160, 160, id="null-at-the-start-of-the-window"),
    pytest.param(40, True, [0], 0, 0, id="pinned-blocks-are-never-gaps"),
    pytest.param(64, True, [4, 5, 9], 0, 0, id="nulls-behind-the-context"),
]


@pytest.mark.parametrize(("context", "prefilling", "nulls", "windowed", "exact"), STARTS)
def test_raw_starts(context, prefilling, nulls, windowed, exact):
    table = torch.arange(7, 7 + MAX_MODEL_LEN // 16, dtype=torch.int32)[None].clone()
    table[0, list(nulls)] = 0
    for window, expected in ((WINDOWED, windowed), (EXACT, exact)):
        found = raw_starts(window, torch.tensor([context]), torch.tensor([prefilling]), table)
        assert found.tolist() == [expected]


def test_stale_ids_below_the_window_are_not_read():
    """A worker's table keeps the ids of freed blocks: only positions may decide."""
    local = torch.arange(1, 33, dtype=torch.int32)[None]
    plan = plan_tokens(
        WINDOWED,
        torch.tensor([0, 1]),
        torch.tensor([300]),
        torch.tensor([False]),
        torch.arange(40, 56, dtype=torch.int32)[None],
        local,
        torch.tensor([299 // 16 * 16 + 299 % 16 + 16]),
    )
    start = (300 - 48) // 32 * 32
    positions = [*range(16), *range(start, 300)]
    assert plan.decode is not None
    read = (plan.decode.block[..., None] * 16 + torch.arange(16) - 16).flatten(1)
    assert read[plan.decode.raw_mask].tolist() == positions
    assert plan.decode.page.tolist() == [40 + i for i in range(start // 32)]
    assert plan.seal is None
    assert not plan.prefill


def test_a_batch_of_padding_only():
    zero = torch.zeros(2, 16, dtype=torch.int32)
    plan = plan_tokens(
        WINDOWED,
        torch.tensor([0, 0, 0]),
        torch.tensor([0, 0]),
        torch.tensor([False, False]),
        zero,
        zero,
        torch.tensor([-1, -1]),
    )
    assert (plan.seal, plan.decode, plan.prefill) == (None, None, [])
    assert not len(plan.store)


@pytest.mark.parametrize("exact", [False, True], ids=["windowed", "exact"])
def test_one_token_of_a_prompt(exact):
    """A last chunk of one token is prefill where prefill is exact, a decode step otherwise."""
    window = replace(WINDOWED, exact_prefill=exact)
    plan = plan_tokens(
        window,
        torch.tensor([0, 1]),
        torch.tensor([200]),
        torch.tensor([True]),
        torch.arange(40, 56, dtype=torch.int32)[None],
        torch.arange(1, 33, dtype=torch.int32)[None],
        torch.tensor([-1]),
    )
    assert (plan.decode is None) == exact
    if exact:
        (chunk,) = plan.prefill
        assert len(chunk.page) == 0
        assert len(chunk.cells.block) == 199
