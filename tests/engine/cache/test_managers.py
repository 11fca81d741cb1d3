"""Counts of blocks: what is predicted, held at most, hit again, and reported as capacity."""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    get_max_concurrency_for_kv_cache_config,
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from fourier_vllm.config import Geometry
from fourier_vllm.engine.cache.local_cache import SUFFIX
from fourier_vllm.engine.cache.specs import FourierLocalSpec, FourierPageSpec
from fourier_vllm.engine.recipe_choice import EngineRecipe
from fourier_vllm.engine.sizes import id_bytes, layer_layout, num_local_groups, window_of
from fourier_vllm.recipe import LayerRecipe, ModelFingerprint, Provenance, Recipe
from fourier_vllm.window import Window
from tests.support.planner import plan_caches
from tests.support.scheduling import Engine, engine_config, local_spec, page_spec
from tests.support.stamps import LOCAL_GROUP, PAGE_GROUP
from tests.support.traffic import EXACT, WINDOWED, simulate

WIDE = Window(page_size=64, local_window=96, sink_tokens=16, block_size=8, exact_prefill=False)
NO_SINKS = replace(WINDOWED, sink_tokens=0, block_size=8)
MODES = {
    "windowed": WINDOWED,
    "exact": EXACT,
    "wide": WIDE,
    "wide-exact": replace(WIDE, exact_prefill=True),
    "no-sinks": NO_SINKS,
}


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


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Maker of engine configurations; each call gives a fresh one."""
    folder = tmp_path_factory.mktemp("model")

    def make(max_model_len: int = 512, max_num_seqs: int = 4, max_num_batched_tokens: int = 96):
        return engine_config(
            folder,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )

    return make


class Pool:
    """vLLM's KVCacheManager without a scheduler: requests advance as they are told to.

    Up to `batches` steps of a request are in flight; `held` and `most` count its raw blocks.
    """

    def __init__(
        self,
        config,
        window: Window,
        num_blocks: int,
        batches: int = 1,
        local_groups: int = 1,
        caches: KVCacheConfig | None = None,
    ) -> None:
        init_none_hash(sha256)
        self.window, self.batches = window, batches
        locals_ = [
            KVCacheGroupSpec([f"layer{i}.fourier_local"], local_spec(window, local_groups))
            for i in range(local_groups)
        ]
        self.caches = caches or KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], page_spec(window)), *locals_],
        )
        scheduler_block_size, hash_block_size = resolve_kv_cache_block_sizes(self.caches, config)
        self.manager = KVCacheManager(
            self.caches,
            config.model_config.max_model_len,
            scheduler_block_size,
            hash_block_size,
            max_in_flight_tokens=batches * config.scheduler_config.max_num_batched_tokens,
        )
        self.hasher = get_request_block_hasher(hash_block_size, sha256)
        self.pool = self.manager.block_pool
        self.local = self.manager.coordinator.single_type_managers[LOCAL_GROUP]
        self.in_flight: dict[str, deque[int]] = {}
        self.most = 0

    def request(self, name: str, prompt: list[int]) -> Request:
        self.in_flight[name] = deque()
        return Request(name, prompt, SamplingParams(), None, block_hasher=self.hasher)

    def held(self, request: Request, group: int = LOCAL_GROUP) -> int:
        return sum(not b.is_null for b in self.manager.get_blocks(request.request_id).blocks[group])

    def advance(self, request: Request, n: int) -> bool:
        """Schedule `n` tokens; the oldest step in flight is processed first."""
        steps = self.in_flight[request.request_id]
        while len(steps) >= self.batches:
            request.num_in_flight_tokens -= steps.popleft()
        first = request.num_computed_tokens == 0
        hit, blocks = 0, None
        if first:
            blocks, hit, _ = self.manager.get_computed_blocks(request)
        new = self.manager.allocate_slots(
            request, n, hit, blocks, full_sequence_must_fit=first, has_scheduled_reqs=False
        )
        if new is None:
            return False
        request.num_computed_tokens += hit + n
        request.num_in_flight_tokens += n
        steps.append(n)
        self.most = max(self.most, self.held(request))
        return True

    def prefill(self, request: Request, chunks) -> bool:
        """Compute the whole prompt; `chunks()` is the next chunk's size."""
        while request.num_computed_tokens < request.num_tokens:
            n = min(chunks(), request.num_tokens - request.num_computed_tokens)
            if not self.advance(request, n):
                return False
        return True

    def decode(self, request: Request, until: int) -> bool:
        while request.num_computed_tokens < until:
            request.append_output_token_ids(7)
            if not self.advance(request, 1):
                return False
        return True

    def free(self, request: Request) -> None:
        self.manager.free(request)


def prompt(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(500) for _ in range(n)]


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


def capacity(
    config, window: Window, num_blocks: int, max_model_len: int, batches: int, local_groups: int = 1
) -> tuple[Pool, float, int]:
    """A pool, the concurrency vLLM reports for it, and the largest chunk."""
    chunk = 200
    cfg = config(max_model_len, max_num_batched_tokens=chunk)
    cfg.scheduler_config.async_scheduling = batches > 1
    assert cfg.max_concurrent_batches == batches
    pool = Pool(cfg, window, num_blocks, batches, local_groups)
    cfg.cache_config.num_gpu_blocks = num_blocks
    return pool, get_max_concurrency_for_kv_cache_config(cfg, pool.caches), chunk


def fill(pool: Pool, n: int, max_model_len: int, chunk: int, seed: int) -> bool:
    """Whether `n` requests fit that all reach `max_model_len`, each prefilling beside the others.

    They stop at different places of their last page, so that the window is at its widest in some.
    """
    rng = random.Random(seed)
    for i in range(n):
        length = max_model_len - rng.randrange(40, 60)
        request = pool.request(f"{i}", prompt(length, seed=1000 * seed + i))
        smallest = chunk if i % 2 else 1
        if not pool.prefill(request, lambda least=smallest: rng.randint(least, chunk)):
            return False
        if not pool.decode(request, max_model_len - rng.randrange(24)):
            return False
    return True


@pytest.mark.parametrize("batches", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("local_groups", [1, 3], ids=["one-local-group", "three-local-groups"])
@pytest.mark.parametrize("num_blocks", [97, 250, 411])
@pytest.mark.parametrize("mode", ["windowed", "exact", "wide", "wide-exact"])
def test_reported_concurrency_really_runs(config, mode, num_blocks, local_groups, batches):
    window, length = MODES[mode], 512
    if local_groups > 1:
        num_blocks *= 2
    pool, concurrency, chunk = capacity(config, window, num_blocks, length, batches, local_groups)
    n = math.floor(concurrency)
    assert n >= 1
    assert fill(pool, n, length, chunk, seed=num_blocks), f"{n} requests do not fit"
    # Not far below what is possible either: two more never fit.
    pool, _, _ = capacity(config, window, num_blocks, length, batches, local_groups)
    assert not fill(pool, n + 2 + (n // 8), length, chunk, seed=num_blocks)


def bits(*counts: int) -> list[list[int]]:
    """Counts of dims with 8, 4 and 2 bits of a head of 128, the same for 8 heads."""
    coded = [b for b, n in zip((8, 4, 2), counts, strict=True) for _ in range(n)]
    return [coded + [0] * (128 - len(coded))] * 8


PLAIN, MORE, MOST = ((bits(8, n, 40), 2) for n in (24, 40, 60))


def planned(config, layers, local_block_size=None, prefill="windowed", length=2048, blocks=400):
    """What vLLM's planner makes of the specs of a model: its configuration, and the specs."""
    fingerprint = ModelFingerprint(
        architecture="x", num_layers=len(layers), num_heads=8, num_kv_heads=8, head_size=128
    )
    geometry = Geometry(128, 256, 16, local_block_size)
    recipe = Recipe(
        name="test",
        model=fingerprint,
        coefficients=4,
        layers=[LayerRecipe(k=k, v=v) for k, v in layers],
        provenance=Provenance(source="manual"),
    )
    engine = EngineRecipe(fingerprint, geometry, recipe, "balanced", prefill, "test")
    specs = {}
    for i in range(len(layers)):
        layout = layer_layout(engine, i, 0, 1, 2, None)
        total = id_bytes(engine, 1, layout)
        window = window_of(engine, len(layers) * layout.raw_bytes / total)
        block_bytes = layout.raw_bytes // window.page_size * window.block_size
        groups = num_local_groups(len(layers), total, block_bytes)
        shape: dict[str, Any] = dict(num_kv_heads=8, head_size=128)
        name = f"model.layers.{i}.self_attn.attn"
        specs[name] = replace(page_spec(window, layout.page_bytes), **shape)
        specs[name + SUFFIX] = replace(local_spec(window, groups), **shape)
    cfg = config(length, max_num_batched_tokens=512)
    cfg.cache_config.kv_cache_layout = "BLHNC"
    memory = blocks * sum(s.page_size_bytes for s in specs.values() if s.block_size == 128)
    caches = plan_caches(cfg, specs, memory)
    cfg.cache_config.num_gpu_blocks = caches.num_blocks
    return cfg, caches, window


@pytest.mark.parametrize("prefill", ["windowed", "exact"])
@pytest.mark.parametrize(
    ("layers", "options", "groups"),
    [
        pytest.param([PLAIN] * 8, {}, 1, id="uniform"),
        pytest.param([PLAIN] * 8, {"local_block_size": 64}, 3, id="blocks-of-64"),
        pytest.param([PLAIN] * 8, {"local_block_size": 128}, 8, id="blocks-of-128"),
        pytest.param([([[16] * 128] * 8, 16)] * 8, {}, 1, id="lossless"),
        pytest.param([PLAIN] * 3 + [MORE] * 3 + [MOST] * 2, {}, 1, id="three-page-sizes"),
        pytest.param([PLAIN] * 4 + [MORE] * 4, {}, 1, id="two-page-sizes-balanced"),
        pytest.param([PLAIN, MORE], {}, 1, id="two-layers"),
        pytest.param([PLAIN, MORE, MOST], {}, 1, id="all-different"),
        pytest.param(
            [(bits(n, 0, 0), 4) for n in (0, 0, 0, 40, 128, 128, 90, 20)], {}, None, id="far-apart"
        ),
    ],
)
def test_capacity_of_what_vllm_plans(config, layers, options, groups, prefill):
    """However the planner groups the layers, the reported number of requests runs at once."""
    cfg, caches, window = planned(config, layers, prefill=prefill, **options)
    pages, *locals_ = caches.kv_cache_groups
    assert isinstance(pages.kv_cache_spec, FourierPageSpec)
    assert all(isinstance(g.kv_cache_spec, FourierLocalSpec) for g in locals_)
    assert sum(len(g.layer_names) for g in caches.kv_cache_groups) == 2 * len(layers)
    assert len(locals_) == (groups or len(locals_))
    n = math.floor(get_max_concurrency_for_kv_cache_config(cfg, caches))
    assert n >= 1
    pool = Pool(cfg, window, caches.num_blocks, caches=caches)
    assert fill(pool, n, 2048, 512, seed=1), f"{n} requests do not fit"


@pytest.mark.parametrize("mode", ["windowed", "exact"])
def test_reported_concurrency_through_the_scheduler(config, mode):
    """The same with the real scheduler: nothing is preempted, all run at once."""
    window, length, num_blocks = MODES[mode], 512, 160
    cfg = config(length, max_num_seqs=32, max_num_batched_tokens=96)
    engine = Engine(cfg, window, num_blocks, prefix_caching=False)
    caches = engine.scheduler.kv_cache_manager.kv_cache_config
    n = math.floor(get_max_concurrency_for_kv_cache_config(cfg, caches))
    assert n >= 3
    for i in range(n):
        engine.add(f"{i}", prompt(length - 70, seed=i), 70)
    engine.run()
    assert engine.max_running == n
    assert engine.num_preemptions == 0


@pytest.mark.parametrize("batches", [1, 2], ids=["sync", "async"])
@pytest.mark.parametrize("mode", MODES)
def test_one_request_fits_what_the_start_up_check_asks_for(config, mode, batches):
    """Before the pool is sized: a pool of just that many blocks serves the longest request."""
    window, length, chunk = MODES[mode], 512, 200
    cfg = config(length, max_num_batched_tokens=chunk)
    cfg.scheduler_config.async_scheduling = batches > 1
    cfg.cache_config.num_gpu_blocks = None
    needed = sum(
        spec.max_memory_usage_bytes(cfg) // spec.page_size_bytes
        for spec in (page_spec(window), local_spec(window))
    )
    pool = Pool(cfg, window, needed + 1, batches)
    assert fill(pool, 1, length, chunk, seed=1)
    # And the check is not generous: half of it would not do.
    pool = Pool(cfg, window, needed // 2, batches)
    assert not fill(pool, 1, length, chunk, seed=1)


@pytest.mark.parametrize("mode", MODES)
def test_admission_cap_lets_the_longest_request_in(config, mode):
    """The gate must never ask for more than the start-up check made sure of."""
    cfg = config(512, max_num_batched_tokens=200)
    for batches in (1, 2):
        cfg.scheduler_config.async_scheduling = batches > 1
        spec = local_spec(MODES[mode])
        cap = spec.max_admission_blocks_per_request(cfg.max_in_flight_tokens, 512)
        assert cap <= spec.peak_blocks(512, batches, 200)
        assert cap <= 512 // spec.block_size


@pytest.mark.parametrize("answer", [8, 300, 2000])
@pytest.mark.parametrize("length", [4096, 65536])
@pytest.mark.parametrize(
    "layers", [[PLAIN] * 4, [([[16] * 128] * 8, 16)] * 4], ids=["6x", "lossless"]
)
def test_chats_that_fit_are_found_again(config, layers, length, answer):
    """Chats up to 90 % of the reported capacity come back and find their full pages."""
    cfg, caches, window = planned(config, layers, length=length, blocks=700)
    reported = get_max_concurrency_for_kv_cache_config(cfg, caches) * length
    pool = Pool(cfg, window, caches.num_blocks, caches=caches)

    def chat(i: int) -> list[int]:
        return prompt(1000, seed=i) + [7] * answer

    n = int(0.9 * reported / (1000 + answer))
    assert n > 10
    for i in range(n):
        request = pool.request(f"{i}", prompt(1000, seed=i))
        assert pool.prefill(request, lambda: 512)
        assert pool.decode(request, 1000 + answer)
        pool.free(request)
    found = 0
    for i in range(n):
        request = pool.request(f"{i} again", [*chat(i), 1, 2, 3])
        found += pool.manager.get_computed_blocks(request)[1]
        assert pool.prefill(request, lambda: 512)
        pool.free(request)
    assert found >= 0.95 * n * ((1000 + answer) // window.page_size * window.page_size)
