"""Seeds of the fuzzers: fresh in each run, bounded in time, and a seed that failed can be run again.

FOURIER_FUZZ_SEED     run this seed only
FOURIER_FUZZ_SECONDS  how long each fuzzer draws seeds, instead of its own bound
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator

ONLY = os.environ.get("FOURIER_FUZZ_SEED")
# Seeds of one process follow each other, so that fuzzers can share what is drawn from the first.
FIRST = (int(ONLY) if ONLY else random.SystemRandom().randrange(10**9)) // 10**5 * 10**5


def _seeds(seconds: float) -> Iterator[int]:
    """Seeds until the time is over, one at least."""
    end, seed = time.monotonic() + seconds, FIRST
    while True:
        yield seed
        seed += 1
        if time.monotonic() > end:
            return


def fuzz(seconds: float, run: Callable[[int], None]) -> None:
    """Call `run(seed)` with many seeds.

    Raises
    ------
    AssertionError
        A run failed; the message says which seed repeats it.
    """
    bound = float(os.environ.get("FOURIER_FUZZ_SECONDS", seconds))
    for seed in [int(ONLY)] if ONLY else _seeds(bound):
        try:
            run(seed)
        except Exception as error:
            raise AssertionError(f"FOURIER_FUZZ_SEED={seed} repeats this: {error}") from error


def finds(seconds: float, run: Callable[[int], None], fault: type[Exception]) -> bool:
    """Negative control: whether `run` raises `fault` within the time."""
    for seed in _seeds(seconds):
        try:
            run(seed)
        except fault:
            return True
    return False
