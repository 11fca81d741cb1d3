"""`fourier-vllm eval --engine`, beside the same evaluation with the codec in the loop of transformers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fourier_vllm.evaluation import engine_run
from fourier_vllm.evaluation.evaluate import evaluate, run
from fourier_vllm.evaluation.options import Options
from fourier_vllm.evaluation.session import CodecSession, hold, prefill, stack
from fourier_vllm.recipe import ModelFingerprint, find_bundled, target_recipe

TASKS = "fourier_vllm.evaluation.tasks"
WINDOW = 16  # the smallest
SMOLLM2 = ModelFingerprint(
    architecture="LlamaForCausalLM",
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_size=64,
    rope_theta=1e5,
)


class AfterHit:
    """A session whose questions begin with the tokens that a prefix hit leaves to compute again."""

    def __init__(self, session, rest):
        self.session, self.rest = session, rest

    def score(self, prompt, target):
        return self.session.score([*self.rest, *prompt], target)


def measure_after_hit(model, ids, probes, forms, layers, span, rows, update):
    """`evaluate.measure`, but the tokens behind the last page attend to pages, as after a hit."""
    exact = prefill(model, ids[: span.end])
    for form in forms:
        cache, bits = hold(exact, form, layers, span.start, span.end)
        rows.bits[form.name].append(bits)
        session = CodecSession(model, stack([cache]), span.end)
        for task, probe in probes:
            (metrics,) = probe.measure(AfterHit(session, ids[span.end :]))
            rows.add(form.name, task, metrics)
        update(1)


def test_engine_and_codec_agree(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """In float32, with a prompt in one chunk, both ways prefill exactly and read the same pages."""
    monkeypatch.setattr(engine_run, "DTYPE", "float32")
    monkeypatch.setattr(sys.modules[f"{TASKS}.agreement"], "GENERATED_TOKENS", 48)
    monkeypatch.setattr(sys.modules[f"{TASKS}.nll"], "SCORED_TOKENS", 128)
    recipes = {
        "lossless": target_recipe(SMOLLM2, "lossless"),
        "balanced": find_bundled(SMOLLM2, "balanced"),
    }
    for name, recipe in recipes.items():
        recipe.model_copy(update={"local_window": WINDOW}).save(tmp_path / f"{name}.json")
    files = [tmp_path / f"{name}.json" for name in recipes]
    common = dict(context=1536 + WINDOW, documents=1, questions=2)
    options = Options(
        str(smollm2),
        recipes=files,
        tasks=["nll", "multikey", "agreement"],
        out=tmp_path / "engine",
        engine=True,
        **common,
    )
    assert run(options) == 0
    assert "through vLLM with windowed prefill in chunks of 2048" in capsys.readouterr().out
    data = json.loads((tmp_path / "engine/results.json").read_text())
    assert data["settings"]["engine"]["max_num_batched_tokens"] == 2048
    assert "vllm" in data["versions"]
    rows = {row["name"]: row for row in data["rows"]}
    assert list(rows) == ["exact", "lossless", "balanced"]
    exact, lossless, balanced = (row["tasks"] for row in rows.values())
    assert lossless["agreement"] == exact["agreement"] == {"same": 1.0, "prefix": 48.0}
    assert lossless["nll"]["nll"] == pytest.approx(exact["nll"]["nll"], abs=1e-4)
    assert len(rows["balanced"]["samples"]["tasks"]["multikey"]["right"]) == 2
    assert "kl" not in balanced["nll"]
    assert balanced["nll"]["nll"] != exact["nll"]["nll"]  # pages were read

    monkeypatch.setattr(
        sys.modules["fourier_vllm.evaluation.evaluate"], "measure", measure_after_hit
    )
    (tmp_path / "codec").mkdir()
    codec = evaluate(
        Options(
            str(smollm2),
            recipes=files[1:],
            tasks=["nll"],
            compare=["none"],
            out=tmp_path / "codec",
            **common,
        )
    )
    for row in codec["rows"]:
        assert rows[row["name"]]["bits"] == pytest.approx(row["bits"])
        ours = rows[row["name"]]["tasks"]["nll"]["nll"]
        assert ours == pytest.approx(row["tasks"]["nll"]["nll"], abs=1e-3)
