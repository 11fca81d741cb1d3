"""Evaluation through the engine, without one: refusals, what a session asks, and the report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fourier_vllm import cli
from fourier_vllm.evaluation.choose import Span
from fourier_vllm.evaluation.engine_run import backend, bits_of
from fourier_vllm.evaluation.engine_session import EngineSession, reason
from fourier_vllm.evaluation.formats.exact import Exact
from fourier_vllm.evaluation.formats.fourier import Fourier
from fourier_vllm.evaluation.options import Options, check
from fourier_vllm.evaluation.report import markdown
from fourier_vllm.evaluation.results import Rows
from fourier_vllm.evaluation.tasks.base import Scores
from fourier_vllm.evaluation.tasks.nll import Continuation
from fourier_vllm.recipe import ModelFingerprint, Recipe, target_recipe

PAGE = 4
CONTEXT = list(range(10))


class FakeLLM:
    """A cache of whole pages; the score of a token is minus its id, and answers count upwards."""

    def __init__(self, remembers: bool = True):
        self.cached: list[list[int]] = []
        self.prompts: list[list[int]] = []
        self.remembers = remembers

    def generate(self, prompts: Any, params: dict[str, Any], use_tqdm: bool) -> list[Any]:
        (ids,) = (prompt["prompt_token_ids"] for prompt in prompts)
        hit = max((common(ids[:-1], other) for other in self.cached), default=0) // PAGE * PAGE
        answer = [ids[-1] + 1 + i for i in range(params["max_tokens"])]
        if self.remembers:
            self.cached.append(ids + answer[:-1])
        self.prompts.append(ids)
        logprobs = None
        if "prompt_logprobs" in params:
            assert params["skip_reading_prefix_cache"] is False
            scored = [{token: SimpleNamespace(logprob=-float(token))} for token in ids[hit + 1 :]]
            logprobs = [None, *scored]
        completion = SimpleNamespace(token_ids=answer)
        return [
            SimpleNamespace(outputs=[completion], num_cached_tokens=hit, prompt_logprobs=logprobs)
        ]

    def reset_prefix_cache(self) -> None:
        self.cached.clear()


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


@pytest.fixture(autouse=True)
def parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=lambda **x: x))


def recipe(page_size: int = 32) -> Recipe:
    model = ModelFingerprint(
        architecture="M", num_layers=2, num_heads=4, num_kv_heads=2, head_size=16, rope_theta=1e4
    )
    return target_recipe(model, "lossless", page_size)


def test_questions_read_the_cached_context() -> None:
    llm = FakeLLM()
    session = EngineSession(llm, CONTEXT, 8)
    (scores,) = session.score([20, 21], [30, 31, 32])
    assert scores.target.tolist() == [-30.0, -31.0, -32.0]
    assert scores.vocabulary is None
    assert session.generate([40], 3) == [[41, 42, 43]]
    assert llm.prompts == [CONTEXT, [*CONTEXT, 20, 21, 30, 31, 32], [*CONTEXT, 40]]


def test_a_target_that_is_cached_is_scored_all_the_same() -> None:
    """An answer that equals the continuation leaves its pages in the cache, and with it no scores."""
    llm = FakeLLM()
    session = EngineSession(llm, CONTEXT, 8)
    session.generate([10], 12)
    (scores,) = session.score([10], list(range(11, 20)))
    assert scores.target.tolist() == [-float(x) for x in range(11, 20)]
    assert llm.prompts.count(CONTEXT) == 2


def test_a_context_that_is_not_cached_is_refused() -> None:
    session = EngineSession(FakeLLM(remembers=False), CONTEXT, 8)
    with pytest.raises(ValueError, match="cached 0 tokens of a context of 10 and 8 are needed: ch"):
        session.generate([20], 1)


def test_nll_without_the_vocabulary_has_no_kl() -> None:
    session = SimpleNamespace(score=lambda prompt, target: [Scores(torch.tensor([-1.0, -2]), None)])
    assert Continuation([1, 2, 3]).measure(session) == [{"nll": 1.5}]


def test_bits_are_those_of_the_pages(tmp_path: Path) -> None:
    form, span = Fourier(recipe(), "mine"), Span(16, 96, 32, 48)
    k = torch.randn(2, span.end, 16)
    held = [form.hold(k, k, span.start, layer).bits for layer in range(2)]
    assert bits_of(form, span) == sum(held) / 2
    assert bits_of(Exact(form.recipe.model), span) == 16
    options = backend(form, tmp_path)
    assert options["attention_backend"] == "fourier"
    fourier = options["additional_config"]["fourier"]
    assert fourier["prefill"] == "windowed"
    assert Recipe.load(fourier["recipe"]) == form.recipe
    assert backend(Exact(form.recipe.model), tmp_path) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(compare=["fp8"]), "--compare has 'fp8', and --engine runs stock attention and reci"),
        (dict(compare=["all"]), "--compare has 'all', and --engine"),
        (dict(device="cpu"), "--device has no effect on --engine"),
        (dict(chunk=0), "--chunk must be 1 to"),
        (dict(engine=False, chunk=512), "--chunk is an option of the engine: add --engine or"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    options = dict(engine=True, out=tmp_path) | changes
    with pytest.raises(ValueError, match=message) as refusal:
        check(Options("m", **options))
    assert "\n" not in str(refusal.value)


def test_needs_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fourier_vllm.evaluation.options.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--engine needs vLLM, which is not installed"):
        check(Options("m", engine=True, out=tmp_path))


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "m", "--engine", "--compare", "kivi2", "--out", str(tmp_path)]
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("fourier-vllm eval: --compare has 'kivi2'")
    assert error.count("\n") == 1


def test_reasons_are_one_line() -> None:
    assert reason(ValueError("first.\nsecond")) == "first"
    assert reason(RuntimeError()) == "RuntimeError"
    with pytest.raises(ValueError, match="architecture") as refusal:
        ModelFingerprint(architecture=1)  # type: ignore[call-arg]
    assert reason(refusal.value) == "Input should be a valid string"


def test_table() -> None:
    rows = Rows({"exact": "exact", "balanced": "fourier"})
    for name, nll in (("exact", 2.0), ("balanced", 2.01)):
        rows.bits[name].append(16.0)
        rows.add(name, "nll", {"nll": nll})
    engine = {"prefill": "windowed", "max_num_batched_tokens": 512}
    settings = dict(context=900, start=16, end=640, seed=0, dtype="bfloat16", text="manuals")
    text = markdown(
        dict(model="m", settings=settings | {"engine": engine}, documents_done=1, rows=rows.dump())
    )
    assert "through vLLM with windowed prefill in chunks of 512" in text
    assert "| format | bits | smaller by | NLL |" in text
    assert "| `balanced` | 16.00 | 1.00x | +0.0100 |" in text
