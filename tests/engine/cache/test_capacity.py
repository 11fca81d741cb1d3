"""The capacity that vLLM reports is what really runs."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
from vllm.v1.core.kv_cache_utils import (
    get_max_concurrency_for_kv_cache_config,
)

from fourier_vllm.config import Geometry
from fourier_vllm.engine.cache.local_cache import SUFFIX
from fourier_vllm.engine.cache.specs import FourierLocalSpec, FourierPageSpec
from fourier_vllm.engine.recipe_choice import EngineRecipe
from fourier_vllm.engine.sizes import id_bytes, layer_layout, num_local_groups, window_of
from fourier_vllm.recipe import LayerRecipe, ModelFingerprint, Provenance, Recipe
from fourier_vllm.window import Window
from tests.support.planner import plan_caches
from tests.support.pool import MODES, Pool, prompt
from tests.support.scheduling import Engine, local_spec, page_spec


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
