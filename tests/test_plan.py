"""What a step reads and writes, through vLLM's own scheduler and block managers (invariant 3)."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fourier_vllm.engine.managers import FourierLocalManager
from fourier_vllm.engine.plan import Window, make_plan, raw_starts
from tests.scheduling import Engine, ReadError, engine_config

WINDOWED = Window(page_size=32, local_window=48, sink_tokens=16, block_size=16, exact_prefill=False)
EXACT = replace(WINDOWED, exact_prefill=True)
MAX_MODEL_LEN = 512


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


def simulate(
    config,
    window: Window,
    *,
    seed: int = 0,
    num_blocks: int = 400,
    prefix_caching: bool = True,
    in_flight: int = 1,
    runner: str = "v1",
    num_requests: int = 12,
    max_tokens: tuple[int, ...] = (1, 3, 40, 90),
    disturb: bool = True,
    make: type[Engine] = Engine,
) -> Engine:
    """Requests that share prefixes come, are preempted, aborted, and come again, at random."""
    rng = random.Random(seed)
    options: dict[str, Any] = dict(
        prefix_caching=prefix_caching, in_flight=in_flight, runner=runner, seed=seed
    )
    engine = make(config(), window, num_blocks, **options)
    families = [[rng.randrange(500) for _ in range(MAX_MODEL_LEN)] for _ in range(2)]
    waiting = []
    for i in range(num_requests):
        family, length = rng.choice(families), rng.choice([1, 5, 31, 32, 33, 64, 130, 200, 300])
        own = [rng.randrange(500) for _ in range(rng.choice([0, 0, 1, 20, 70]))]
        waiting.append((f"{i}", family[:length] + own, rng.choice(max_tokens)))
    for _ in range(3000):
        if waiting and rng.random() < 0.2:
            engine.add(*waiting.pop())
        if not waiting and not engine.scheduler.has_unfinished_requests():
            break
        # As if the token budget differed from step to step.
        engine.scheduler.max_num_scheduled_tokens = rng.choice([1, 7, 16, 33, 64, 96])
        if disturb and rng.random() < 0.01:
            engine.preempt()
        running = engine.scheduler.running
        if disturb and running and rng.random() < 0.004:
            engine.abort(rng.choice(running).request_id)
        engine.step()
    engine.run()
    return engine


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
    ("window", "num_blocks"), [(WINDOWED, 40), (EXACT, 60)], ids=["windowed", "exact"]
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


@st.composite
def windows(draw: st.DrawFn) -> Window:
    W = draw(st.sampled_from((32, 64)))
    return Window(
        page_size=W,
        local_window=draw(st.sampled_from((16, 32, 48, 80))),
        sink_tokens=draw(st.sampled_from((0, 1, 16, 24, 32))),
        block_size=draw(st.sampled_from((8, 16, 32))),
        exact_prefill=draw(st.booleans()),
    )


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    window=windows(),
    seed=st.integers(0, 10**6),
    prefix_caching=st.booleans(),
    in_flight=st.sampled_from((1, 2)),
    runner=st.sampled_from(("v1", "v2")),
    num_blocks=st.sampled_from((110, 150, 400)),
)
def test_any_window_in_any_situation(config, window, num_blocks, **situation):
    simulate(config, window, num_blocks=num_blocks, num_requests=6, **situation)


@pytest.mark.parametrize("in_flight", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("window", [WINDOWED, EXACT], ids=["windowed", "exact"])
def test_a_short_window_is_noticed(config, window, in_flight, monkeypatch):
    """Negative control: the least that breaks the window makes the simulation fail."""
    # The manager keeps up to one block more than is read, so one block and one token are missed.
    original = FourierLocalManager._first_kept
    short = window.block_size + 1
    monkeypatch.setattr(
        FourierLocalManager, "_first_kept", lambda self, n: original(self, n + short)
    )
    with pytest.raises(ReadError):
        simulate(config, window, prefix_caching=False, in_flight=in_flight)


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
    plan = make_plan(
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
    plan = make_plan(
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
    plan = make_plan(
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
