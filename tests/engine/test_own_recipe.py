"""The option `own-text`: made in a process of its own, once, and found again."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fourier_vllm.engine import own_recipe
from fourier_vllm.engine import recipe_choice as recipes
from fourier_vllm.engine import start_log as report
from fourier_vllm.engine.fingerprint import fingerprint_of
from fourier_vllm.engine.recipe_choice import engine_recipe
from fourier_vllm.engine.startup import resolve
from fourier_vllm.recipe import target_recipe
from tests.support.refusals import check_sentence, refusal
from tests.support.scheduling import LLAMA, engine_config

OWN = {"fourier": {"recipe": "own-text"}}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FOURIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "recipes"


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "Toy"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def start(model, fourier=None, **options):
    """The configuration of an engine with the option, as its process builds it."""
    additional = {"fourier": OWN["fourier"] | (fourier or {})}
    settings = dict(load_format="auto", attention_backend="fourier", max_model_len=512)
    return engine_config(model, additional_config=additional, **settings | options)


@pytest.fixture
def calibrations(monkeypatch) -> list[list[str]]:
    """Commands that were run; each leaves a recipe, and none calibrates."""
    commands: list[list[str]] = []
    shape = SimpleNamespace(
        hf_text_config=SimpleNamespace(**LLAMA),
        architectures=["LlamaForCausalLM"],
        get_total_num_kv_heads=lambda: LLAMA["num_key_value_heads"],
        get_head_size=lambda: LLAMA["head_dim"],
    )

    real = subprocess.run

    def run(command, **options):
        if "calibrate" not in command:  # vLLM looks at a model class in a process of its own
            return real(command, **options)
        commands.append(command)
        time.sleep(0.2)
        page = int(command[command.index("--page-size") + 1])
        recipe = target_recipe(fingerprint_of(shape), "paper", page)
        recipe.save(command[command.index("-o") + 1])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(own_recipe.subprocess, "run", run)
    return commands


def test_made_once_and_found_again(cache, model, calibrations):
    first, again = start(model), start(model)
    (command,) = calibrations
    assert command[1:5] == ["-m", "fourier_vllm.cli", "calibrate", str(model)]
    assert {"--own-text", "--no-check"} < set(command)
    assert command[command.index("--target") + 1] == "balanced"
    (path,) = cache.glob("*.json")
    assert path.name.startswith("toy-balanced-")
    for config in (first, again):
        assert config.additional_config == {"fourier": {"recipe": str(path)}}
        found = engine_recipe(config)
        assert found.recipe is not None
        assert found.source == str(path)


def test_workers_only_read(cache, model, calibrations, monkeypatch):
    """What they are sent names a file."""
    config = start(model, {"prefill": "exact"})
    monkeypatch.setattr(own_recipe, "_make", lambda *_: pytest.fail("a worker calibrates"))
    (path,) = cache.glob("*.json")
    path.unlink()
    recipes._load.cache_clear()
    with pytest.raises(ValueError, match="does not exist"):
        resolve(config)
    assert config.additional_config["fourier"]["prefill"] == "exact"


def test_what_makes_another_recipe(cache, model, calibrations):
    start(model)
    start(model, {"local_block_size": 8})
    assert len(calibrations) == 1
    for fourier in ({"target": "quality"}, {"page_size": 64}, {"sink_tokens": 4}):
        start(model, fourier)
    start(model, tensor_parallel_size=2)
    weights = model / "model.safetensors"
    os.utime(weights, (1, 1))
    start(model)
    weights.write_bytes(b"other weights")
    os.utime(weights, (1, 1))
    start(model)
    assert len(calibrations) == 7
    assert len(list(cache.glob("*.json"))) == 7


def test_a_hub_model_is_told_apart_by_its_commit():
    def name(commit):
        config = SimpleNamespace(
            model="org/Some-Model", hf_config=SimpleNamespace(_commit_hash=commit)
        )
        return own_recipe._file_name(config, "compact", [])

    assert name("a").startswith("some-model-compact-")
    assert name("a") == name("a") != name("b")


def test_two_engines_at_once(cache, model, calibrations):
    arguments = ["--page-size", "32"]
    threads = [
        threading.Thread(target=own_recipe._make, args=(cache / "r.json", "m", arguments))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calibrations) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(load_format="dummy"), ["--load-format dummy has no weights"]),
        (dict(revision="v2"), ["--revision asks for another"]),
        (dict(fourier={"target": "lossless"}), ["found 'own-text'", "leave it out"]),
    ],
)
def test_refused_before_anything_runs(cache, model, calibrations, options, words):
    fourier = options.pop("fourier", {})
    additional = {"fourier": OWN["fourier"] | fourier}
    settings = dict(load_format="auto") | options
    check_sentence(refusal(model, additional_config=additional, **settings), *words)
    assert not calibrations


@pytest.mark.parametrize(
    ("stderr", "words"),
    [
        ("noise\nfourier-vllm calibrate: model 'x' cannot be loaded (why): give y.\n", ["(why)"]),
        ("  File x\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", ["CUDA"]),
        ("", ["calibration ended with -9"]),
        ("fourier-vllm calibrate: " + "\u00e9" * 999, ["..."]),
    ],
)
def test_the_sentence_of_calibration_is_passed_on(cache, model, monkeypatch, stderr, words):
    monkeypatch.setattr(
        own_recipe.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=-9, stderr=stderr)
    )
    message = refusal(model, additional_config=OWN, load_format="auto")
    check_sentence(message, "recipe 'own-text' cannot be made", "leave the option `recipe`", *words)


def test_no_place_for_it(tmp_path, model, calibrations, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FOURIER_CACHE", str(tmp_path / "file"))
    message = refusal(model, additional_config=OWN, load_format="auto")
    check_sentence(message, "no file can be made", "FOURIER_CACHE")


def test_weights_that_are_none(cache, model):
    """The real process; it ends with calibration's own refusal."""
    message = refusal(model, additional_config=OWN, load_format="auto")
    check_sentence(message, "cannot be loaded", "leave the option `recipe` out")
    assert not list(cache.glob("*.json"))


def test_a_predicted_recipe_names_the_better_ones(cache, model, calibrations, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(report.logger, "info_once", lambda line, *_: said.append(line))
    start(model)
    assert not said
    start(model, {"recipe": None})
    (line,) = said
    assert "predicted" in line
    assert '"recipe": "own-text"' in line
    assert "fourier-vllm calibrate" in line
