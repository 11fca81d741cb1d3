"""Fuzzer: vLLM's scheduler and block managers over stamps, in any situation (invariant 3).

`tests/support/fuzzing.py` tells how a run is repeated or made longer.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from fourier_vllm.engine.cache.managers import FourierLocalManager
from fourier_vllm.engine.cache.specs import FourierLocalSpec
from fourier_vllm.window import Window
from tests.support.fuzzing import finds, fuzz
from tests.support.scheduling import engine_config, local_spec
from tests.support.stamps import ReadError
from tests.support.traffic import MAX_CHUNK, MAX_MODEL_LEN, simulate

SECONDS = 40


@pytest.fixture
def run(tmp_path):
    """Simulates the situation that a seed stands for; `changes` are options of the simulation."""

    def run(seed: int, **changes: Any) -> None:
        rng = random.Random(seed)
        window = Window(
            page_size=rng.choice((32, 64)),
            local_window=rng.choice((16, 32, 48, 80)),
            sink_tokens=rng.choice((0, 1, 16, 24, 32)),
            block_size=rng.choice((8, 16, 32)),
            exact_prefill=rng.random() < 0.4,
        )
        in_flight = rng.choice((1, 2, 3))
        # The least that one request of the maximum length needs, with the null block.
        least = local_spec(window).peak_blocks(MAX_MODEL_LEN, in_flight, MAX_CHUNK)
        least += MAX_MODEL_LEN // window.page_size + 1
        scheduler = dict(
            scheduling_policy=rng.choice(("fcfs", "priority")),
            max_num_seqs=rng.choice((2, 4, 8)),
            long_prefill_token_threshold=rng.choice((0, 40, 70)),
        )
        situation: dict[str, Any] = dict(
            num_blocks=least + rng.choice((0, 4, 15, 40, 300)),
            prefix_caching=rng.random() < 0.8,
            in_flight=in_flight,
            runner=rng.choice(("v1", "v2")),
            gather=rng.choice(("v0.32", "v0.33")),
            num_requests=rng.choice((6, 12)),
            max_tokens=rng.choice(((1, 3, 40, 90), (140,))),
        )
        situation |= changes
        try:
            simulate(
                lambda: engine_config(
                    tmp_path,
                    max_model_len=MAX_MODEL_LEN,
                    max_num_batched_tokens=MAX_CHUNK,
                    **scheduler,
                ),
                window,
                seed=seed,
                **situation,
            )
        except Exception as error:
            error.args = (f"{error}; {window} {scheduler} {situation}",)
            raise

    return run


def test_every_read_is_right(run):
    fuzz(SECONDS, run)


def test_a_short_window_is_found(run, monkeypatch):
    """Negative control: a window that is short by one block and one token."""
    original = FourierLocalManager._first_kept
    monkeypatch.setattr(
        FourierLocalManager,
        "_first_kept",
        lambda self, n: original(self, n + self.block_size + 1),
    )
    assert finds(SECONDS, run, ReadError)


def test_lost_sinks_are_found(run, monkeypatch):
    """Negative control: vLLM 0.33's runner nulls all that leaves the window, pinned blocks too."""
    monkeypatch.setattr(
        FourierLocalSpec, "num_retained_tokens", property(lambda self: self.sliding_window)
    )
    assert finds(SECONDS, lambda seed: run(seed, gather="v0.33"), ReadError)
