"""How much memory something takes on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most bytes of tensors that `work` holds at a time, beside those from before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [*found.profiler.kineto_results.experimental_event_tree()]
    changes, held, peak = [], 0, 0
    while events:
        event = events.pop()
        events += event.children
        if event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    for _, size in sorted(changes):
        held += size
        peak = max(peak, held)
    return peak
