"""Calibration text that the model writes by itself, and a recipe from it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fourier_vllm import cli
from fourier_vllm.calibration import calibrate as calibration
from fourier_vllm.calibration import own_text
from fourier_vllm.calibration.collect import full_attention_layers
from fourier_vllm.calibration.own_text import write, write_once
from fourier_vllm.calibration.progress import Progress
from fourier_vllm.recipe import Recipe
from tests.support.tiny import tiny

TOKENIZER = SimpleNamespace(bos_token_id=1, eos_token_id=2)


@pytest.fixture
def llama():
    return tiny("Llama")


@pytest.mark.parametrize("family", ["Qwen2", "Gemma3"])
def test_the_text_is_what_generate_samples(family):
    """Gemma 3 reads part of its own text through a sliding window."""
    model = tiny(family)
    documents = write(model, TOKENIZER, 600, 32, 256)
    assert [x.shape for x in documents] == [(256,)] * 3
    assert all(x.dtype == torch.int64 and x[0] == 1 for x in documents)
    first = torch.full((3, 1), 1)
    model.generation_config.eos_token_id = None
    with torch.random.fork_rng():
        torch.manual_seed(own_text.SEED)
        expected = model.generate(
            first,
            attention_mask=torch.ones_like(first),
            do_sample=True,
            temperature=own_text.TEMPERATURE,
            top_k=0,
            max_new_tokens=255,
        )
    assert torch.equal(torch.stack(documents), expected)


def test_nothing_but_the_weights_and_the_seed_counts(llama):
    first = write(llama, TOKENIZER, 512, 32, 256)
    assert any((x == 2).any() for x in first), "an end of text ends no document"
    llama.generation_config.update(
        eos_token_id=2, top_k=1, min_p=0.9, repetition_penalty=5.0, max_new_tokens=9
    )
    torch.manual_seed(99)
    before = torch.get_rng_state()
    second = write(llama, TOKENIZER, 512, 32, 256)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(torch.stack(first), torch.stack(second))
    assert all(p.requires_grad and p.grad is None for p in llama.parameters())


@pytest.mark.parametrize(("eos", "start"), [(2, 2), (None, 0)])
def test_without_a_beginning_of_text(llama, eos, start):
    (found,) = write(llama, SimpleNamespace(bos_token_id=None, eos_token_id=eos), 256, 32)
    assert found[0] == start


@pytest.mark.parametrize(("tokens", "longest"), [(255, 2048), (16384, 255)])
def test_too_short(llama, tokens, longest):
    with pytest.raises(ValueError, match="at least 256 tokens for pages of 32, found 255"):
        write(llama, TOKENIZER, tokens, 32, longest)


def test_written_once(tmp_path):
    path = tmp_path / "text.npz"
    written: list[Any] = []

    def texts():
        written.append(torch.full((2, 5), len(written)))
        return list(written[-1])

    first = write_once(path, "model", 5, write=texts)
    again = write_once(path, "model", 5, write=texts)
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert again[0].dtype == torch.int64
    assert write_once(path, "model", 6, write=texts)[0][0] == 1
    path.write_bytes(b"PK\x03\x04 cut short")
    assert write_once(path, "model", 6, write=texts)[0][0] == 2
    with pytest.raises(ValueError, match=r"cannot be written \(No such file"):
        write_once(tmp_path / "missing" / "text.npz", write=texts)


@pytest.fixture
def command(tmp_path, monkeypatch, llama):
    """`fourier-vllm calibrate --own-text` in an empty folder."""
    monkeypatch.setattr(calibration, "load", lambda *_: (llama, TOKENIZER))
    monkeypatch.setattr(own_text, "OWN_DOCUMENT_TOKENS", 256)
    monkeypatch.chdir(tmp_path)
    return lambda *options: cli.main(
        ["calibrate", "some/Tiny-Model", "--own-text", "--page-size", "32", "--local-window", "32",
         "--target", "compact", "--tokens", "512", "--no-check", *options]
    )  # fmt: skip


def test_the_command_writes_a_recipe(command, tmp_path, llama):
    assert command("-o", "r.json") == 0
    recipe = Recipe.load("r.json")
    assert recipe.provenance.source == "calibrated"
    assert recipe.provenance.text == "written by the model itself, temperature 0.6"
    assert recipe.provenance.tokens == 512
    assert len(recipe.layers) == len(full_attention_layers(llama))
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_an_interrupted_command_goes_on_with_its_text(command, tmp_path, monkeypatch, capsys):
    assert command("-o", "whole.json") == 0
    save = Progress.save

    def stop(self, num_done, sums):
        save(self, num_done, sums)
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "save", stop)
    assert command("-o", "r.json") == 130
    monkeypatch.setattr(Progress, "save", save)
    monkeypatch.setattr(own_text, "write", lambda *_: pytest.fail("text was written again"))
    capsys.readouterr()
    assert command("-o", "r.json") == 0
    assert "1 of 2 documents done" in capsys.readouterr().out
    assert Recipe.load("r.json").layers == Recipe.load("whole.json").layers
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "whole.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "some.txt"], "--own-text takes the place of --text: give one of them."),
        (["--tokens", "64"], "must be at least 256 tokens for pages of 32, found 64"),
        (["--page-size", "128"], "must be at least 1024 tokens for pages of 128, found 256"),
    ],
)
def test_refusals_are_one_sentence(command, capsys, options, message):
    assert command(*options) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("fourier-vllm calibrate: ")
    assert message in err[-1]
