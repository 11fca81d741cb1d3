"""vLLM's offloading tier on a machine without a GPU: its own scheduler and worker, with copies made at once.

The worker's copy engine is CUDA's. Here it is torch's, and events are over when they are recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch


class Stream:
    """Of a device that has one."""

    def __init__(self, priority: int = 0) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0


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

    def shutdown(self) -> None:
        pass


@contextmanager
def copies_without_cuda(late: int = 0) -> Iterator[dict[str, int]]:
    """Engines in here may offload on a CPU; blocks that went down and came back are counted."""
    from vllm.v1.simple_kv_offload import worker

    from fourier_vllm.engine import refuse

    made = Copies(late)
    with (
        patch.object(worker, "DmaCopyBackend", lambda: made),
        patch.object(worker, "PIN_MEMORY", False),
        patch.object(torch.cuda, "Stream", Stream),
        patch.object(torch.cuda, "current_stream", lambda *_: None),
        patch.object(torch, "Event", Event),
        patch.object(refuse, "_tier_problems", lambda *_: iter(())),
    ):
        yield made.moved
