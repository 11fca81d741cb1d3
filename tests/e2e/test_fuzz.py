"""Fuzzer: lossless engines beside stock, request by request, in any situation.

Stock answers all requests once, without a prefix cache. Every round is an engine with options of its own that
gets some of the requests at any time, with priorities, aborts and parallel sampling, in a pool of any size.
vLLM on CPU schedules one step at a time; `tests/engine/cache/test_fuzz_scheduler.py` has up to three in
flight.
"""

from __future__ import annotations

import random
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pytest

from fourier_vllm.engine.cache.managers import FourierLocalManager
from fourier_vllm.engine.cache.specs import FourierLocalSpec
from fourier_vllm.window import Window
from tests.support import fuzzing
from tests.support.engine import blocks_held, engine, gather_like_v33, poison_free_blocks
from tests.support.scheduling import local_spec
from tests.support.toys import VOCAB_SIZE

SECONDS = 60
PAGE_SIZE, MAX_MODEL_LEN, ANSWER = 32, 640, 80
LENGTHS = (1, 2, 15, 31, 32, 33, 47, 48, 49, 64, 80, 95, 96, 97, 112, 128, 129, 200, 333, 500)
NEAR = 2e-3  # log-probabilities nearer than this are not told apart


class WrongAnswerError(AssertionError):
    """An engine's answer is not stock's."""


@dataclass
class Asked:
    """A request and stock's answer: greedy tokens, the log-probabilities of the best two of each."""

    ids: list[int]
    tokens: list[int]
    best: list[dict[int, float]]
    prompt_logprobs: list[float]

    def check(self, tokens: list[int], is_whole: bool, max_tokens: int) -> None:
        """Tokens that equal stock's, up to a place where stock itself has two that are alike."""
        right = self.tokens[: max_tokens if is_whole else len(tokens)]
        if tokens == right:
            return
        i = next((i for i, (a, b) in enumerate(zip(tokens, right, strict=False)) if a != b), None)
        if i is not None and max(self.best[i].values()) - min(self.best[i].values()) < NEAR:
            return
        raise WrongAnswerError(f"a prompt of {len(self.ids)} tokens, wrong from token {i}")


def sampling(n: int, max_tokens: int, **options: Any) -> Any:
    from vllm import SamplingParams

    # vLLM wants a temperature where n > 1; one candidate is the greedy token.
    options |= dict(temperature=1, top_k=1, detokenize=False, ignore_eos=True)
    return SamplingParams(n=n, max_tokens=max_tokens, **options)


def prompt_values(output: Any) -> list[float]:
    """Log-probability of each token of the prompt but the first."""
    return [next(iter(x.values())).logprob for x in output.prompt_logprobs[1:]]


@pytest.fixture(scope="module")
def asked(toy) -> list[Asked]:
    """Requests of this run that share prefixes."""
    rng = random.Random(fuzzing.FIRST)
    families = [[rng.randrange(3, VOCAB_SIZE) for _ in range(max(LENGTHS))] for _ in range(3)]
    prompts = []
    for length in LENGTHS:
        own = [rng.randrange(3, VOCAB_SIZE) for _ in range(min(rng.choice((0, 1, 7, 40)), length))]
        prompts.append(rng.choice(families)[: length - len(own)] + own)
    options = dict(enable_prefix_caching=False, max_model_len=MAX_MODEL_LEN, max_num_seqs=16)
    with engine(toy(), None, max_num_batched_tokens=MAX_MODEL_LEN, **options) as llm:
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts],
            sampling(1, ANSWER, logprobs=2, prompt_logprobs=0),
            use_tqdm=False,
        )
    return [
        Asked(
            ids,
            list(output.outputs[0].token_ids),
            [{t: x.logprob for t, x in step.items()} for step in output.outputs[0].logprobs],
            prompt_values(output),
        )
        for ids, output in zip(prompts, outputs, strict=True)
    ]


def play(llm: Any, asked: list[Asked], rng: random.Random) -> None:
    """Ask some requests at any time, give some up, check whatever was answered."""
    core = llm.llm_engine
    plan: dict[str, Any] = {}
    events: list[tuple[int, bool, str]] = []  # step, whether to abort, request
    for i in range(9):
        n, at = rng.choice((1, 1, 1, 2, 3)), rng.randrange(30)
        max_tokens = rng.choice((1, 2, PAGE_SIZE, PAGE_SIZE + 1, 60, ANSWER))
        logprobs = rng.choice([None] * 6 + [0]) if n == 1 else None
        plan[f"{i}"] = (rng.choice(asked), n, max_tokens, logprobs)
        events.append((at, False, f"{i}"))
        if rng.random() < 0.15:
            events.append((at + rng.randrange(1, 40), True, f"{i}"))
    events.sort(reverse=True)
    for step in range(5000):
        while events and events[-1][0] <= step:
            _, is_abort, name = events.pop()
            if is_abort:
                core.abort_request([name])
                continue
            one, n, max_tokens, logprobs = plan[name]
            core.add_request(
                name,
                {"prompt_token_ids": one.ids},
                sampling(n, max_tokens, prompt_logprobs=logprobs),
                priority=rng.randrange(3),
            )
        if not events and not core.has_unfinished_requests():
            break
        for output in core.step():
            one, n, max_tokens, logprobs = plan[output.request_id]
            for completion in output.outputs:
                is_whole = completion.finish_reason == "length"
                one.check(list(completion.token_ids), is_whole, max_tokens)
            if logprobs is not None and output.finished and output.prompt_logprobs:
                far = zip(prompt_values(output), one.prompt_logprobs, strict=True)
                if max((abs(a - b) for a, b in far), default=0) > NEAR:
                    raise WrongAnswerError("prompt_logprobs")
    else:
        raise AssertionError("requests are stuck")
    assert blocks_held(llm) == 0


@pytest.fixture
def run(toy, asked):
    """One round: the engine and the requests that a seed stands for; `changes` are engine options."""

    def run(seed: int, **changes: Any) -> None:
        rng = random.Random(seed)
        window = Window(
            page_size=PAGE_SIZE,
            local_window=rng.choice((16, 48, 64)),
            sink_tokens=rng.choice((0, 1, 16, 24, 32)),
            block_size=rng.choice((8, 16, 32)),
            exact_prefill=rng.random() < 0.4,
        )
        fourier = dict(
            target="lossless",
            page_size=window.page_size,
            local_window=window.local_window,
            sink_tokens=window.sink_tokens,
            local_block_size=window.block_size,
            prefill="exact" if window.exact_prefill else "windowed",
        )
        chunk = rng.choice((40, 64, 300, 1024))
        options: dict[str, Any] = dict(
            max_num_batched_tokens=chunk,
            max_num_seqs=rng.choice((2, 4, 8)),
            scheduling_policy=rng.choice(("fcfs", "priority")),
            enable_prefix_caching=rng.random() < 0.75,
        )
        # The least that one request of the maximum length needs, with the null block.
        least = local_spec(window).peak_blocks(MAX_MODEL_LEN, 1, chunk)
        least += MAX_MODEL_LEN // PAGE_SIZE + 1
        if rng.random() < 0.6:
            options["num_gpu_blocks_override"] = least + rng.choice((0, 4, 15))
        gather = rng.random() < 0.5
        options |= changes
        try:
            with ExitStack() as stack:
                if gather:
                    stack.enter_context(gather_like_v33())
                llm = stack.enter_context(
                    engine(toy(), fourier, max_model_len=MAX_MODEL_LEN, **options)
                )
                if not options["enable_prefix_caching"]:
                    stack.enter_context(poison_free_blocks(llm))
                play(llm, asked, rng)
        except Exception as error:
            error.args = (f"{error}; {fourier} {options} gather like 0.33: {gather}",)
            raise

    return run


def test_answers_equal_stock(run):
    fuzzing.fuzz(SECONDS, run)


def test_a_short_window_is_found(run, monkeypatch):
    """Negative control: blocks are freed while they are still read."""
    original = FourierLocalManager._first_kept
    monkeypatch.setattr(
        FourierLocalManager, "_first_kept", lambda self, n: original(self, n + self.block_size + 1)
    )
    assert fuzzing.finds(
        SECONDS, lambda seed: run(seed, enable_prefix_caching=False), WrongAnswerError
    )


def test_lost_sinks_are_found(run, monkeypatch):
    """Negative control: vLLM 0.33's runner nulls all that leaves the window, pinned blocks too."""
    monkeypatch.setattr(
        FourierLocalSpec, "num_retained_tokens", property(lambda self: self.sliding_window)
    )
    with gather_like_v33():
        assert fuzzing.finds(SECONDS, run, WrongAnswerError)
