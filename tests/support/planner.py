"""vLLM's own planner of cache groups, as its engine core calls it."""

from __future__ import annotations

from typing import Any

from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import KVCacheConfig


def plan_caches(config: Any, specs: dict[str, Any], memory: int) -> KVCacheConfig:
    """Cache groups, as the scheduler sees them, of one worker with `memory` bytes for `specs`."""
    try:
        from vllm.v1.core import kv_cache_planning as planner
    except ImportError:  # vLLM 0.32
        worker = kv_cache_utils.get_kv_cache_configs(config, [specs], [memory])
    else:
        groups = planner.get_global_kv_cache_groups(config, [specs])
        worker = planner.get_kv_cache_configs(config, [specs], [memory], groups)
    return kv_cache_utils.generate_scheduler_kv_cache_config(worker)
