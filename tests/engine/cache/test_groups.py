"""Cache groups hold our layers alone, under our managers; a start where they do not is refused."""

from __future__ import annotations

import types
from dataclasses import replace

import pytest
import torch
from vllm.v1.core.kv_cache_utils import update_kv_cache_capacity
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from fourier_vllm.engine.cache.groups import check_groups, has_pages
from fourier_vllm.engine.cache.local_cache import SUFFIX
from fourier_vllm.engine.cache.stock_capacity import stock_capacity
from fourier_vllm.engine.patches import kv_cache_capacity
from tests.support.planner import plan_caches
from tests.support.scheduling import engine_config, local_spec, page_spec
from tests.support.traffic import WINDOWED

SHAPE = dict(num_kv_heads=2, head_size=32, dtype=torch.bfloat16)
REACH = WINDOWED.local_window + WINDOWED.page_size
MEMORY = 1 << 22


def ours(reach: int = REACH):
    """Two compressed layers."""
    local = replace(local_spec(WINDOWED), sliding_window=reach)  # type: ignore[call-arg]
    # Pages large enough that vLLM puts several raw caches into one group.
    pages = {f"{i}.attn": page_spec(WINDOWED, 1 << 14) for i in (1, 3)}
    return pages | {name + SUFFIX: local for name in pages}


def sliding(window: int = REACH):
    """Two layers of the model's own sliding window, in blocks of the same size."""
    spec = SlidingWindowSpec(block_size=WINDOWED.block_size, sliding_window=window, **SHAPE)
    return {"0.attn": spec, "2.attn": spec}


def planned(folder, specs):
    config = engine_config(folder, max_model_len=512)
    config.cache_config.kv_cache_layout = "BLHNC"
    return config, plan_caches(config, specs, MEMORY)


@pytest.mark.parametrize(
    "specs",
    [
        pytest.param(ours(), id="alone"),
        pytest.param(sliding(REACH + 1) | ours(), id="another-window"),
        pytest.param(sliding() | ours(REACH + 1), id="moved-out-of-the-way"),
        pytest.param(ours() | sliding(), id="ours-first"),
    ],
)
def test_caches_are_planned_apart(tmp_path, specs):
    _, caches = planned(tmp_path, specs)
    assert has_pages(caches)
    check_groups(caches)


@pytest.mark.parametrize(
    ("specs", "manager"),
    [
        pytest.param(sliding() | ours(), "SlidingWindowManager", id="equal-windows"),
        pytest.param(
            {"0.attn": FullAttentionSpec(block_size=WINDOWED.page_size, **SHAPE)} | ours(),
            "FullAttentionManager",
            id="uncompressed-full-attention",
        ),
        pytest.param(
            ours() | {"0.attn": FullAttentionSpec(block_size=WINDOWED.page_size, **SHAPE)},
            "FourierPageManager",
            id="uncompressed-full-attention-last",
        ),
    ],
)
def test_a_mixed_group_is_refused(tmp_path, specs, manager):
    _, caches = planned(tmp_path, specs)
    with pytest.raises(ValueError, match=rf"under {manager}; change the option `local_window`"):
        check_groups(caches)


def test_pages_in_two_groups_are_refused(tmp_path):
    """Raw caches of one group would share a plan made for one of the tables of pages."""
    _, caches = planned(tmp_path, ours())
    pages = next(g for g in caches.kv_cache_groups if "1.attn" in g.layer_names)
    both = [replace(pages, layer_names=[name]) for name in pages.layer_names]
    caches.kv_cache_groups = [g for g in caches.kv_cache_groups if g is not pages] + both
    with pytest.raises(ValueError, match="cannot run 2 groups of pages"):
        check_groups(caches)


def test_the_engine_core_asks(tmp_path, monkeypatch):
    """The check and the report hang on the function that vLLM's engine core calls after planning."""
    core = types.SimpleNamespace(update_kv_cache_capacity=update_kv_cache_capacity)
    monkeypatch.setitem(kv_cache_capacity.sys.modules, kv_cache_capacity.ENGINE_CORE, core)
    kv_cache_capacity.install()
    wrapped = core.update_kv_cache_capacity
    kv_cache_capacity.install()
    assert core.update_kv_cache_capacity is wrapped is not update_kv_cache_capacity
    with pytest.raises(ValueError, match="cannot run beside"):
        wrapped(*planned(tmp_path, sliding() | ours()))
    config, caches = planned(tmp_path, sliding())
    wrapped(config, caches)  # an engine without compressed layers
    assert config.cache_config.kv_cache_size_tokens > 512


@pytest.mark.parametrize("others", [{}, sliding(64)], ids=["all-compressed", "beside-windows"])
def test_stock_capacity_is_what_stock_plans(tmp_path, others):
    """In the memory that was planned with compression."""
    config, caches = planned(tmp_path, others | ours())
    full = FullAttentionSpec(block_size=16, **SHAPE)
    stock = engine_config(tmp_path, max_model_len=512)
    stock.cache_config.kv_cache_layout = "LBNHC"
    plain = plan_caches(stock, others | {"1.attn": full, "3.attn": full}, MEMORY)
    stock.cache_config.num_gpu_blocks = plain.num_blocks
    update_kv_cache_capacity(stock, plain)
    expected = stock.cache_config.kv_cache_size_tokens
    assert stock_capacity(config, caches) == pytest.approx(expected, rel=0.01)
