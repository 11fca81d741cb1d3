"""Sends traffic to an engine in this process and takes the time of every token."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.serve import greedy
from benchmarks.workloads.traffic import Request, Traffic


@dataclass
class Timing:
    """One request; seconds."""

    request: Request
    came: float
    first: float | None = None
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)

    def add(self, ids: list[int], now: float) -> None:
        if not ids:
            return
        if self.first is None:
            self.first = now - self.came
        else:
            self.gaps.append(now - self.last)
        self.last = now
        self.answer += ids


def drive(llm: Any, traffic: Traffic) -> tuple[float, list[Timing]]:
    """Run all requests and what follows them.

    Returns
    -------
    float
        Seconds until the last answer.
    list of Timing
        In the order in which they ended.
    """
    engine, begin = llm.llm_engine, time.perf_counter()
    waiting = deque(traffic.requests)
    live: dict[str, Timing] = {}
    done: list[Timing] = []
    while waiting or live:
        now = time.perf_counter() - begin
        while waiting and waiting[0].at <= now and len(live) != traffic.at_once:
            request = waiting.popleft()
            # One that had to wait for a place was not late: its client was not there yet.
            live[request.name] = Timing(request, max(request.at, now if traffic.at_once else 0))
            prompt = {"prompt_token_ids": request.ids}
            engine.add_request(request.name, prompt, greedy(request.new))
        if not live:
            time.sleep(max(0.0, waiting[0].at - now))
            continue
        for output in engine.step():
            now = time.perf_counter() - begin
            timing = live[output.request_id]
            timing.add(list(output.outputs[0].token_ids), now)
            if output.finished:
                done.append(live.pop(output.request_id))
                next_one = traffic.follow(timing.request, timing.answer)
                if next_one is not None:
                    waiting.append(next_one)
    return time.perf_counter() - begin, done


def percentiles(seconds: list[float]) -> list[float] | None:
    """Half and 99 of 100, milliseconds."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    late = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return [round(1e3 * median(ordered), 1), round(1e3 * late, 1)]


def summary(seconds: float, done: list[Timing]) -> dict[str, Any]:
    """What a row says of a run; times in milliseconds as [p50, p99]."""
    first = [x.first for x in done if x.first is not None]
    later = [x.first for x in done if x.first is not None and x.request.turn]
    return {
        "requests": len(done),
        "makespan_s": round(seconds, 2),
        "req_s": round(len(done) / seconds, 3),
        "out_tok_s": round(sum(len(x.answer) for x in done) / seconds, 1),
        "ttft_ms": percentiles(first),
        "ttft_later_ms": percentiles(later),
        "itl_ms": percentiles([gap for x in done for gap in x.gaps]),
    }
