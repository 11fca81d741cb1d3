"""What vLLM would hold in the same memory without compression, by its own planner."""

from __future__ import annotations

import copy
from typing import Any

from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec

from fourier_vllm.engine.cache.local_cache import SUFFIX
from fourier_vllm.engine.cache.specs import FourierPageSpec

try:  # vLLM 0.33 moved its planner
    from vllm.v1.core import kv_cache_planning as planner
except ImportError:
    planner = kv_cache_utils

BLOCK_SIZE = 16  # vLLM's default on GPUs
LAYOUT = "LBNHC"  # vLLM's default


def stock_capacity(vllm_config: Any, kv_cache_config: Any) -> int:
    """KV tokens of requests of the maximum length; less than one request's where none fits.

    Parameters
    ----------
    kv_cache_config : vllm.v1.kv_cache_interface.KVCacheConfig
        As planned with compression, for the memory and the layers.
    """
    specs: dict[str, Any] = {}
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, FourierPageSpec):
            spec = FullAttentionSpec(
                block_size=BLOCK_SIZE,
                num_kv_heads=spec.num_kv_heads,
                head_size=spec.head_size,
                dtype=spec.dtype,
            )
        specs |= {name: spec for name in group.layer_names if not name.endswith(SUFFIX)}
    config = copy.copy(vllm_config)
    config.cache_config = copy.copy(vllm_config.cache_config)
    config.cache_config.num_gpu_blocks_override = None
    config.cache_config.kv_cache_layout = LAYOUT
    groups = planner.get_kv_cache_groups(config, specs)
    memory = kv_cache_config.kv_cache_tensors[0].size
    plain = planner.get_kv_cache_config_from_groups(config, groups, memory)
    return kv_cache_utils.get_kv_cache_capacity(config, plain)[0]
