"""vLLM's offloading tier: what to ask of it, and how to have it on a machine without a GPU.

There its scheduler and worker run as they are. The worker's copy engine is CUDA's: here it is torch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from tests.support.engine import blocks_held, generate, prompts, tokens


def offload(gib: float = 0.05, **settings: Any) -> dict[str, Any]:
    """Options of an engine that has so much CPU memory below it; `settings` are the connector's."""
    found: dict[str, Any] = {"disable_log_stats": False, "kv_offloading_size": gib}
    if settings:
        found["kv_transfer_config"] = {"kv_connector_extra_config": settings}
    return found


def forget(llm: Any) -> None:
    """Empty the GPU's prefix cache once all transfers are over; the tier keeps what it has."""
    for _ in range(100):  # steps that end transfers
        generate(llm, [[5, 6, 7]], 2)
        if blocks_held(llm) == 0:
            break
    assert blocks_held(llm) == 0
    assert llm.reset_prefix_cache()


def later_turns(llm: Any) -> list[list[int]]:
    """Prompts, the same from the tier alone, one half of which the GPU has, and second turns."""
    ids = prompts()
    first = generate(llm, ids, 40)
    forget(llm)
    again = generate(llm, ids, 40)
    forget(llm)
    generate(llm, [ids[3][:150]], 2)
    longer = generate(llm, [ids[3]], 40)
    turns = [p + a + [7, 8, 9] for p, a in zip(ids, tokens(first), strict=True)]
    forget(llm)
    return tokens(first) + tokens(again) + tokens(longer) + tokens(generate(llm, turns, 40))


def hits(llm: Any) -> int:
    """Tokens that came from the tier, as vLLM's metrics say."""
    name = "vllm:external_prefix_cache_hits"
    return sum(metric.value for metric in llm.get_metrics() if metric.name == name)


class Stream:
    """Of a device that has one."""

    def __init__(self, priority: int = 0) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def wait_event(self, event: Any) -> None:
        pass


class Event:
    """Of work that is done when it was asked for so many times."""

    def __init__(self, late: int = 0) -> None:
        self.late = late

    def record(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        self.late -= 1
        return self.late < 0

    def synchronize(self) -> None:
        pass


class Copies:
    """In place of `DmaCopyBackend`; a copy is made at once, and over `late` steps later."""

    def __init__(self, late: int) -> None:
        self.late, self.moved = late, {"stored": 0, "loaded": 0}

    def init(self, gpu: dict[str, Any], cpu: dict[str, Any], *_: Any) -> None:
        self.caches = gpu, cpu

    def launch_copy(
        self,
        source: list[int],
        target: list[int],
        is_store: bool,
        event_idx: int,
        events_list: list[Any],
        wait_event: Any = None,
    ) -> None:
        gpu, cpu = self.caches
        for name, of_gpu in gpu.items():
            a, b = (of_gpu, cpu[name]) if is_store else (cpu[name], of_gpu)
            b[target] = a[source]
        self.moved["stored" if is_store else "loaded"] += len(source)
        events_list.append((event_idx, Event(self.late)))

    def copy_blocks(self, source: list[int], target: list[int], caches: Any) -> None:
        """Between the caches and a disk's buffers, in place of CUDA's."""
        a, b = caches
        for name in a:
            b[name][target] = a[name][source]
        self.moved["stored" if a is self.caches[0] else "loaded"] += len(source)

    def build_params(self, a: Any, b: Any, *_: Any, **__: Any) -> Any:
        if not hasattr(self, "caches"):  # the first ones are of a store
            self.caches = a, b
        return a, b

    def shutdown(self) -> None:
        pass


@contextmanager
def copies_without_cuda(late: int = 0) -> Iterator[dict[str, int]]:
    """Engines in here may offload on a CPU; blocks that went down and came back are counted."""
    from vllm.v1.simple_kv_offload import disk_backend, worker

    from fourier_vllm.engine import refuse

    made = Copies(late)
    with (
        patch.object(worker, "DmaCopyBackend", lambda: made),
        patch.object(worker, "PIN_MEMORY", False),
        patch.object(disk_backend, "build_params", made.build_params),
        patch.object(disk_backend, "copy_blocks", made.copy_blocks),
        patch.object(disk_backend, "pin_tensor", lambda _: None),
        patch.object(disk_backend, "O_DIRECT", 0),  # not every file system has it
        patch.object(torch.cuda, "Stream", Stream),
        patch.object(torch.cuda, "current_stream", lambda *_: None),
        patch.object(torch, "Event", Event),
        patch.object(refuse, "_connector_problems", lambda *_: iter(())),
    ):
        yield made.moved
