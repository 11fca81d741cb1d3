"""An engine measures its own model: once for the same weights, and the same on all its workers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourier_vllm.calibration.collect import collect
from fourier_vllm.calibration.hf_model import load
from fourier_vllm.engine.measure import damage, start
from fourier_vllm.recipe import Recipe
from fourier_vllm.recipe.describe import ratio_of
from tests.e2e.test_gpu_engine import GPU, GRAPHS
from tests.support.engine import engine, generate, generate_on_replicas, prompts, tokens
from tests.support.toys import add_tokenizer

SIZES = dict(page_size=32, local_window=48, sink_tokens=16)
MEASURED = SIZES | dict(recipe="measured", target="quality")
SHARED = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}

# An engine in a process of its own; arguments: model, options of the plugin, further options, result file.
SCRIPT = """
import json, sys
from tests.support.engine import engine, generate, prompts, tokens

if __name__ == "__main__":
    model, fourier, options, out = sys.argv[1:]
    options = json.loads(options)
    ids = prompts()[4:]
    if "pipeline_parallel_size" in options:
        ids = []  # vLLM 0.32 loses requests there on CPUs, with stock attention too
    with engine(model, json.loads(fourier), **options) as llm:
        json.dump(tokens(generate(llm, ids, 20)) if ids else None, open(out, "w"))
"""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FOURIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "recipes"


def run(model: Path, fourier: dict[str, Any], **options: Any) -> list[list[int]]:
    with engine(model, fourier, skip_tokenizer_init=False, **options) as llm:
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        assert not any("forward" in vars(layer) for layer in layers.values())
        return tokens(generate(llm, prompts()[4:], 20))


def run_apart(
    root: Path, folder: Path, model: Path, fourier: dict[str, Any], **options: Any
) -> list[list[int]]:
    script, out = folder / "script.py", folder / "out.json"
    script.write_text(SCRIPT)
    options |= dict(skip_tokenizer_init=False)
    arguments = [str(model), json.dumps(fourier), json.dumps(options), str(out)]
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=os.environ | SHARED | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-moe"])
def test_measured_once(toy, family, cache, monkeypatch):
    model = add_tokenizer(toy(family))
    first = run(model, MEASURED)
    (file,) = cache.glob("*.json")
    recipe = Recipe.load(file)
    assert recipe.provenance.source == "measured"
    assert ratio_of(recipe) >= 4.5
    assert run(model, SIZES | dict(recipe=str(file))) == first
    monkeypatch.setattr(damage, "_worth", lambda *_: pytest.fail("measured again"))
    assert run(model, MEASURED) == first
    assert list(cache.glob("*.json")) == [file]


def test_damaged_file_and_other_settings(toy, cache):
    """A damaged file is measured again; another target, text or size makes another recipe."""
    model = add_tokenizer(toy())
    first = run(model, MEASURED)
    (file,) = cache.glob("*.json")
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    assert run(model, MEASURED) == first
    assert Recipe.load(file).layers == Recipe.loads(text).layers
    other = cache.parent / "text.txt"
    other.write_text("The quick brown fox jumps over the lazy dog, again. " * 200)
    run(model, MEASURED | dict(calibration_text=str(other)))
    run(model, MEASURED | dict(target="compact"))
    assert len(list(cache.glob("*.json"))) == 3


def test_a_folder_that_cannot_be_written(toy, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FOURIER_CACHE", str(tmp_path / "file"))
    assert run(add_tokenizer(toy()), MEASURED)


@pytest.mark.parametrize("split", ["tensor", "pipeline"])
def test_shared_by_workers(toy, root, tmp_path, cache, split, monkeypatch):
    """What one worker would measure, at equal bytes a rank."""
    model, found = add_tokenizer(toy()), []
    fourier = MEASURED | dict(page_size=64)
    real = start.measured_recipe

    def spy(fingerprint: Any, statistics: Any, options: Any, provenance: Any) -> Recipe:
        options = start.replace(options, tensor_parallel_size=1 + (split == "tensor"))
        found.append(real(fingerprint, statistics, options, provenance))
        return found[-1]

    monkeypatch.setattr(start, "measured_recipe", spy)
    whole = run(model, fourier)
    (file,) = cache.glob("*.json")
    file.unlink()
    parallel = {f"{split}_parallel_size": 2}
    assert run_apart(root, tmp_path, model, fourier, **parallel) in (whole, None)
    (file,) = cache.glob("*.json")
    assert Recipe.load(file).layers == found[0].layers


def test_two_engines_at_once(toy, cache, monkeypatch, capfd):
    for name, value in SHARED.items():
        monkeypatch.setenv(name, value)
    model = add_tokenizer(toy())
    generate_on_replicas(model, MEASURED, prompts()[4:], 20, skip_tokenizer_init=False)
    assert len(list(cache.glob("*.json"))) == 1
    said = capfd.readouterr().out
    assert said.count("; kept in") == said.count("llama found in") == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_passes_see_what_gradients_see(toy, cache, tmp_path, monkeypatch, dtype):
    """Damage in nats, layer by layer, beside that of `calibrate` on the same text.

    In 16 bits any change rounds all activations behind it anew, which moves these models' predictions more
    than pages do: as small as that is what attention adds to them.
    """
    model = add_tokenizer(toy())
    if dtype == "bfloat16":
        model = shutil.copytree(model, tmp_path / "model")
        weights = load_file(model / "model.safetensors")
        for name in weights:
            if "o_proj" in name:
                weights[name] /= 64
        save_file(weights, model / "model.safetensors", {"format": "pt"})
    seen: dict[str, Any] = {}
    real = start.measure

    def spy(module: Any, of: Any, texts: Any, sizes: Any) -> Any:
        seen.update(texts=texts, sizes=sizes, found=real(module, of, texts, sizes))
        return seen["found"]

    monkeypatch.setattr(start, "measure", spy)
    run(model, MEASURED, dtype=dtype)
    hf, _ = load(str(model))
    expected = collect(hf, seen["texts"].documents, *seen["sizes"])
    for ours, theirs in zip(seen["found"], expected, strict=True):
        torch.testing.assert_close(ours.residual, theirs.residual, rtol=0.02, atol=0)
        for name in ("key_damage", "value_damage"):
            a, b = (float(getattr(x, name)[2].sum()) for x in (ours, theirs))
            assert 1 / 3 < a / b < 3, name


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_on_a_gpu(toy, family, cache):
    """Pages in fragment order, as CUDA graphs; tokens are those of the recipe that was measured."""
    model = add_tokenizer(toy(family))
    fourier = MEASURED | dict(page_size=64, local_window=80)
    options = GPU | GRAPHS | dict(dtype="bfloat16")
    first = run(model, fourier, **options)
    (file,) = cache.glob("*.json")
    assert run(model, fourier | dict(recipe=str(file), target=None), **options) == first
