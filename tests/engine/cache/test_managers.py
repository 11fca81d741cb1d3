"""Counts of blocks: what is predicted, held at most, hit again, and reported as capacity."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.pool import MODES, Pool, prompt, windows
from tests.support.scheduling import Engine
from tests.support.traffic import EXACT, WINDOWED, simulate


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    window=windows(),
    seed=st.integers(0, 10**6),
    num_blocks=st.sampled_from((110, 400)),
    in_flight=st.sampled_from((1, 2)),
    prefix_caching=st.booleans(),
)
def test_prediction_is_what_is_taken(config, window, num_blocks, in_flight, prefix_caching, seed):
    """vLLM checks for room once, then allocates: both must count alike, hits included."""
    checks = 0

    class Checked(Engine):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            coordinator = self.scheduler.kv_cache_manager.coordinator
            predict, allocate = (
                coordinator.get_num_blocks_to_allocate,
                coordinator.allocate_new_blocks,
            )
            left = None

            def predicted(*args, apply_admission_cap=False, **kwargs):
                nonlocal left
                count = predict(*args, apply_admission_cap=apply_admission_cap, **kwargs)
                left = self.pool.get_num_free_blocks() - count
                return count

            def allocated(*args, **kwargs):
                nonlocal checks
                blocks = allocate(*args, **kwargs)
                assert self.pool.get_num_free_blocks() == left
                checks += 1
                return blocks

            coordinator.get_num_blocks_to_allocate = predicted
            coordinator.allocate_new_blocks = allocated

    simulate(
        config,
        window,
        seed=seed,
        num_blocks=num_blocks,
        in_flight=in_flight,
        prefix_caching=prefix_caching,
        num_requests=6,
        make=Checked,
    )
    assert checks > 6


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    window=windows(),
    batches=st.sampled_from((1, 2, 3)),
    length=st.integers(1, 420),
    max_chunk=st.sampled_from((1, 16, 60, 96, 200)),
    seed=st.integers(0, 10**6),
)
def test_bounds_hold_for_any_split(config, window, batches, length, max_chunk, seed):
    rng = random.Random(seed)
    pool = Pool(config(), window, 400, batches)
    spec = pool.local.kv_cache_spec
    request = pool.request("a", prompt(length))
    assert pool.prefill(request, lambda: rng.randint(1, max_chunk))
    assert pool.most <= spec.peak_blocks(512, batches, max_chunk)
    # The window moves once no step of the prefill is in flight.
    settled = request.num_computed_tokens + batches + 1
    assert pool.decode(request, settled)
    pool.most = 0
    assert pool.decode(request, min(settled + 2 * window.page_size, 512))
    assert pool.most <= spec.steady_blocks(512, batches)
    pool.free(request)
    assert pool.pool.get_num_free_blocks() == 399


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_bounds_are_reached(config, mode, batches):
    """A bound that is never reached would cost capacity."""
    window = MODES[mode]
    pool = Pool(config(), window, 400, batches)
    spec = pool.local.kv_cache_spec
    request = pool.request("a", prompt(5))
    assert pool.decode(request, 500)
    assert pool.most == spec.steady_blocks(512, batches)
    peak = 0
    for chunk in (96, 97, 104, 113):
        for length in (417, 480, 490, 512):
            pool.most = 0
            request = pool.request(f"{chunk} {length}", prompt(length, seed=chunk * length))
            assert pool.prefill(request, lambda chunk=chunk: chunk)
            peak = max(peak, pool.most)
            pool.free(request)
    bound = spec.peak_blocks(512, batches, 113)
    # Blocks where the window before a chunk meets it, or the window of its end, count twice.
    assert bound - (0 if window.exact_prefill else 2 * batches) <= peak <= bound


def test_windowed_prefill_needs_no_room_for_the_chunk(config):
    """Attention inside a chunk reads K and V in flight: a long chunk costs a window, no more."""
    pool = Pool(config(max_model_len=4096), WINDOWED, 400)
    request = pool.request("a", prompt(4000))
    assert pool.prefill(request, lambda: 2000)
    assert pool.most <= 2 * (80 // 16 + 1) + 1


def test_exact_prefill_keeps_the_prompt_then_lets_it_go(config):
    pool = Pool(config(), EXACT, 400)
    request = pool.request("a", prompt(400))
    assert pool.prefill(request, lambda: 60)
    assert pool.held(request) == 25
    assert pool.decode(request, 402)
    assert pool.held(request) <= pool.local.kv_cache_spec.steady_blocks(512, 1)
