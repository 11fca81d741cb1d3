"""The workers that share one model: tensor-parallel ranks of pipeline stages."""

from __future__ import annotations

from typing import Any, TypeVar

from torch.distributed import all_gather_object
from vllm.distributed import get_pp_group, get_tp_group

T = TypeVar("T")


def is_first() -> bool:
    """Whether this worker is the one that reads and writes the files."""
    return get_pp_group().rank_in_group == 0 and get_tp_group().rank_in_group == 0


def gather(mine: T) -> list[T]:
    """What every worker gives, by stage and then by rank; each of them has to call it."""
    of_stage = _gather(get_tp_group(), mine)
    return [x for stage in _gather(get_pp_group(), of_stage) for x in stage]


def from_first(mine: T) -> T:
    """What the first worker gives."""
    return gather(mine)[0]


def _gather(group: Any, mine: T) -> list[T]:
    if group.world_size == 1:
        return [mine]
    found: list[Any] = [None] * group.world_size
    all_gather_object(found, mine, group=group.cpu_group)
    return found


def kv_heads(num_kv_heads: int) -> range:
    """Indices of this rank's KV heads; ranks beyond their number share one."""
    rank, world = get_tp_group().rank_in_group, get_tp_group().world_size
    each = max(1, num_kv_heads // world)
    first = rank * num_kv_heads // world
    return range(first, first + each)


def query_heads(here: int) -> range:
    """Indices of this rank's query heads, of which it has `here`."""
    first = get_tp_group().rank_in_group * here
    return range(first, first + here)
