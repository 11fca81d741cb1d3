"""Calibrate, serve and evaluate models of other families, without special cases.

The models are random: this shows that every mechanism fits, not how much quality a recipe keeps.
"""

from __future__ import annotations

import json

import pytest
import torch

from fourier_vllm import cli
from fourier_vllm.calibration.hf_model import fingerprint_of, full_attention_layers, load
from fourier_vllm.evaluation.formats.fourier import Fourier
from fourier_vllm.evaluation.session import CodecSession, hold, prefill
from fourier_vllm.recipe import Recipe
from tests.support.engine import engine, generate, prompts
from tests.support.toys import add_tokenizer

W, S, L = 32, 16, 48
# While the answer grows, the pages are the first eight: no other one is sealed before token 336.
PROMPT, ANSWER, SEALED = 310, 16, 256


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma3"])
def test_calibrate_serve_evaluate(toy, family, tmp_path, capsys):
    folder = str(add_tokenizer(toy(family)))
    file = tmp_path / "recipe.json"
    sizes = ["--page-size", str(W), "--sink-tokens", str(S), "--local-window", str(L)]
    assert cli.main(["calibrate", folder, *sizes, "--tokens", "512", "-o", str(file)]) == 0
    recipe = Recipe.load(file)
    assert recipe.provenance.kl is not None

    model, _ = load(folder)
    layers = full_attention_layers(model)
    assert recipe.model == fingerprint_of(model)
    assert recipe.model.num_layers == len(layers) == (2 if family == "gemma3" else 4)

    ids = prompts()[3] + prompts()[1][:10]
    assert len(ids) == PROMPT
    options = dict(recipe=str(file), prefill="exact")
    with engine(folder, options, max_num_batched_tokens=512) as llm:
        (output,) = generate(llm, [ids], ANSWER)
    answer = list(output.outputs[0].token_ids)
    served = torch.tensor(
        [x[t].logprob for t, x in zip(answer, output.outputs[0].logprobs, strict=True)]
    )[1:]

    # What the engine read from its pages is what the evaluation says they hold.
    exact = prefill(model, ids)
    sealed, _ = hold(exact, Fourier(recipe), layers, S, SEALED)
    errors = []
    for cache in (sealed, exact):
        (scores,) = CodecSession(model, cache, PROMPT).score(answer[:1], answer[1:])
        errors.append(float((scores.target - served).abs().mean()))
    assert errors[0] < 1e-3 < 1e-2 < errors[1]

    out = tmp_path / "eval"
    arguments = ["--recipe", str(file), "--tasks", "nll,needle", "--compare", "kivi2,paper"]
    size = ["--context", "512", "--documents", "1", "--out", str(out)]
    assert cli.main(["eval", folder, *arguments, *size]) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["exact", "recipe", "kivi2", "paper"]
    assert "| `recipe` |" in capsys.readouterr().out
