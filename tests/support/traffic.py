"""Requests at random through vLLM's scheduler and the stamp worker of `tests/support/scheduling.py`."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fourier_vllm.window import Window
from tests.support.scheduling import Engine

WINDOWED = Window(page_size=32, local_window=48, sink_tokens=16, block_size=16, exact_prefill=False)
EXACT = replace(WINDOWED, exact_prefill=True)
MAX_MODEL_LEN = 512
MAX_CHUNK = 96


def simulate(
    config: Callable[[], Any],
    window: Window,
    *,
    seed: int = 0,
    num_blocks: int = 400,
    num_requests: int = 12,
    max_tokens: tuple[int, ...] = (1, 3, 40, 90),
    disturb: bool = True,
    make: type[Engine] = Engine,
    **options: Any,
) -> Engine:
    """Requests that share prefixes come, are preempted, aborted, and come again, at random.

    Parameters
    ----------
    config : callable
        Makes a VllmConfig.
    disturb : bool
        Preempt and abort beyond what the scheduler does, take nearly all free blocks for some steps,
        and empty the prefix cache now and then.
    make, options
        The engine and its options.
    """
    rng = random.Random(seed)
    engine = make(config(), window, num_blocks, seed=seed, **options)
    families = [[rng.randrange(500) for _ in range(MAX_MODEL_LEN)] for _ in range(2)]
    waiting: list[tuple[str, list[int], int, int, int | None]] = []
    while len(waiting) < num_requests:
        family, length = rng.choice(families), rng.choice([1, 5, 31, 32, 33, 64, 130, 200, 300])
        own = [rng.randrange(500) for _ in range(rng.choice([0, 0, 1, 20, 70]))]
        answer, priority = rng.choice(max_tokens), rng.randrange(3)
        logprobs = rng.choice([None] * 7 + [1])  # of the prompt: no hits, all of it is computed
        for _ in range(rng.choice([1, 1, 1, 3])):  # parallel sampling
            name = str(len(waiting))
            waiting.append((name, family[:length] + own, answer, priority, logprobs))
    for _ in range(3000):
        if waiting and rng.random() < 0.2:
            name, prompt, answer, priority, logprobs = waiting.pop()
            engine.add(name, prompt, answer, priority, prompt_logprobs=logprobs)
        if not waiting and not engine.scheduler.has_unfinished_requests():
            break
        # As if the token budget differed from step to step.
        engine.scheduler.max_num_scheduled_tokens = rng.choice([1, 7, 16, 33, 64, MAX_CHUNK])
        if disturb and rng.random() < 0.01:
            engine.preempt()
        if disturb and engine.scheduler.requests and rng.random() < 0.004:
            engine.abort(rng.choice(list(engine.scheduler.requests)))
        if disturb and rng.random() < 0.05:
            engine.squeeze(rng.randrange(12))
        if disturb and not engine.taken and rng.random() < 0.002:
            engine.scheduler.reset_prefix_cache(reset_running_requests=rng.random() < 0.5)
        engine.step()
        if rng.random() < 0.5:
            engine.release()
    engine.release()
    engine.run()
    return engine
