"""Called back when vLLM has planned the caches: the only moment at which all cache groups are known.

vLLM's engine core calls `update_kv_cache_capacity(vllm_config, kv_cache_config)` once, after planning and
before any cache is allocated (0.32 and 0.33). A spec sees its own layer alone, a manager its own group, and a
KV cache builder is a hook of vLLM 0.33 that cannot be chained.
"""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any

ENGINE_CORE = "vllm.v1.engine.core"


def install() -> None:
    """Wrap the function in a process that has an engine core; a second call does nothing.

    Called when the specs are imported, which a core of its own process does after its own module, and when an
    engine is configured, for a core that runs in the user's process or is forked from it.
    """
    core: Any = sys.modules.get(ENGINE_CORE)
    if core is None or hasattr(core.update_kv_cache_capacity, "__wrapped__"):
        return
    original = core.update_kv_cache_capacity

    @wraps(original)
    def update_kv_cache_capacity(vllm_config: Any, kv_cache_config: Any) -> None:
        from fourier_vllm.engine.cache.groups import check_groups, has_pages
        from fourier_vllm.engine.start_log import log_capacity

        original(vllm_config, kv_cache_config)
        if has_pages(kv_cache_config):
            check_groups(kv_cache_config)
            log_capacity(vllm_config, kv_cache_config)

    core.update_kv_cache_capacity = update_kv_cache_capacity
