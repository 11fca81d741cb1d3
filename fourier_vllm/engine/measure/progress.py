"""Says how long the measurement takes: a bar on a terminal, a line in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from fourier_vllm.engine.measure.ranks import is_first
from fourier_vllm.engine.start_log import logger

Done = Callable[[int], None]


@contextmanager
def progress(tokens: int) -> Iterator[Done]:
    """Counts `tokens`; the time of the first ones tells that of the rest."""
    begin, counted = time.monotonic(), 0

    def done(more: int) -> None:
        nonlocal counted
        if not counted and is_first():
            seconds = (time.monotonic() - begin) * (tokens / more - 1)
            logger.info("fourier: the model is measured, once: about %.0f s more", seconds)
        counted += more
        bar.update(more)

    hidden = None if is_first() else True  # None: where there is no terminal
    with tqdm(total=tokens, desc="measure", unit="token", unit_scale=True, disable=hidden) as bar:
        yield done
