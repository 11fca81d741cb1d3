"""The cache groups that vLLM plans: ours hold our layers alone, under our managers."""

from __future__ import annotations

from typing import Any

from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from fourier_vllm.engine.cache.local_cache import SUFFIX
from fourier_vllm.engine.cache.managers import FourierLocalManager, FourierPageManager


def has_pages(kv_cache_config: Any) -> bool:
    """Whether any layer of the model is compressed."""
    return any(
        name.endswith(SUFFIX)
        for group in kv_cache_config.kv_cache_groups
        for name in group.layer_names
    )


def check_groups(kv_cache_config: Any) -> None:
    """Check that every group holds pages, raw caches or other layers, and has the manager for them.

    Pages of all layers are one group: layers whose raw caches share a group share the plan of a step. A raw
    cache under vLLM's own sliding-window manager loses its pinned blocks, and pages under another manager are
    hit when they are not whole: both are wrong answers without an error.

    Raises
    ------
    ValueError
        A group is mixed, another manager would run it, or pages are in several groups.
    """
    groups, num_page_groups = kv_cache_config.kv_cache_groups, 0
    names = {name for group in groups for name in group.layer_names}
    paged = {name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)}

    def manager_of(name: str) -> Any:
        if name.endswith(SUFFIX):
            return FourierLocalManager
        return FourierPageManager if name in paged else None

    for group in groups:
        expected = {manager_of(name) for name in group.layer_names}
        found = KVCacheSpecRegistry.get_manager_class(group.kv_cache_spec)
        ours = found if found in (FourierLocalManager, FourierPageManager) else None
        num_page_groups += ours is FourierPageManager
        if expected != {ours}:
            raise ValueError(
                f"attention backend fourier cannot run beside this model's other caches: vLLM put "
                f"{', '.join(group.layer_names[:3])} of {len(group.layer_names)} layers under "
                f"{found.__name__}; change the option `local_window` by 16, and please report it."
            )
    if num_page_groups != 1:
        raise ValueError(
            f"attention backend fourier cannot run {num_page_groups} groups of pages, which vLLM planned for "
            "this model: leave out --attention-backend fourier for this model, and please report it."
        )
