"""`fourier-vllm calibrate`: the recipe it writes, refusals in one sentence, `inspect`."""

import re

import pytest

from fourier_vllm import cli
from fourier_vllm.calibration import calibrate as calibration
from fourier_vllm.recipe import Recipe
from fourier_vllm.recipe.describe import layouts, ratio_of
from tests.support.tiny import W, calibrate


def test_the_command_writes_a_recipe(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert calibrate(folder) == 0
    recipe = Recipe.load("tiny-model-compact.json")
    assert recipe.provenance.source == "calibrated"
    assert recipe.provenance.text == "text"
    assert recipe.provenance.model == "some/Tiny-Model"
    assert 500 < (recipe.provenance.tokens or 0) <= 600
    assert str(folder) not in recipe.dumps()
    assert f"{ratio_of(recipe):.2f} times smaller" in capsys.readouterr().out


@pytest.mark.parametrize("bits", ["0", "-1", "nan", "inf", "16.5"])
def test_bits_that_make_no_sense(folder, capsys, bits):
    assert calibrate(folder, "--bits", bits, target=None) == 1
    found = f"{float(bits):g}"
    assert capsys.readouterr().err == (
        "fourier-vllm calibrate: --bits must be above 0 and at most 16, found"
        f" {found}: choose about 3.\n"
    )


@pytest.mark.parametrize(
    ("option", "found"),
    [
        ("--tokens", "0"),
        ("--local-window", "0"),
        ("--local-window", "-16"),
        ("--sink-tokens", "-1"),
        ("--sink-tokens", "129"),
        ("--tensor-parallel-size", "0"),
    ],
)
def test_counts_that_make_no_sense(capsys, option, found):
    """Refused before a model is looked for."""
    assert cli.main(["calibrate", "no-such-model", option, found]) == 1
    assert capsys.readouterr().err.startswith(f"fourier-vllm calibrate: {option} must be ")


def test_bits_instead_of_a_target(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert calibrate(folder, "--bits", "3", target="quality") == 1
    assert "--bits asks for what --target would: give one of them." in capsys.readouterr().err
    assert calibrate(folder, "--bits", "4", target=None) == 0
    recipe = Recipe.load("tiny-model-4-bits.json")
    assert recipe.name == "4-bits"
    assert 4 <= ratio_of(recipe) < 4.6


def test_what_cannot_be_met_is_said_before_anything_is_measured(folder, capsys, monkeypatch):
    monkeypatch.setattr(calibration, "collect", None)
    assert calibrate(folder, "--bits", "0.1", target=None) == 1
    refusal = capsys.readouterr().err.splitlines()[-1]
    assert "160 times was asked for: ask for less, or take larger pages." in refusal
    most, bits = re.search(r"up to ([\d.]+) times smaller \(([\d.]+) bits", refusal).groups()
    assert float(most) == pytest.approx(16 / float(bits), rel=0.01)
    assert calibrate(folder, "--tensor-parallel-size", "0") == 1
    assert "--tensor-parallel-size must be at least 1, found 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "missing"], "cannot be read \\(No such file"),
        (["--text", "binary"], "is not UTF-8 \\(at byte 0\\)"),
        (["--text", "short"], "text has 3 tokens"),
        (["--tokens", "64"], "--tokens must be at least 256"),
        (["-o", "missing/recipe.json"], "cannot be written"),
        (["-o", "."], "cannot be written"),
        (["--local-window", "3"], "--local-window must be from 16 to 65536, found 3"),
        (["--sink-tokens", "99"], "--sink-tokens must be from 0 to 32, found 99"),
    ],
)
def test_refusals_are_one_sentence(folder, capsys, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    (folder / "short").write_text("1 2 3")
    assert calibrate(folder, *options) == 1
    err = capsys.readouterr().err.splitlines()
    refusal = err[-1]
    assert refusal.startswith("fourier-vllm calibrate: ")
    with pytest.raises(ValueError, match=message):
        raise ValueError(refusal)


def test_no_such_model(tmp_path, capsys):
    assert cli.main(["calibrate", str(tmp_path), "-o", str(tmp_path / "r.json")]) == 1
    assert "cannot be loaded" in capsys.readouterr().err


def test_inspect(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert calibrate(folder, "-o", "r.json") == 0
    capsys.readouterr()
    assert cli.main(["inspect", "r.json"]) == 0
    out = capsys.readouterr().out
    assert "compact for LlamaForCausalLM: 3 layers, 2 KV heads of 32" in out
    recipe = Recipe.load("r.json")
    lines = out.splitlines()
    assert lines[-2].split()[-1] == f"{ratio_of(recipe):.2f}"
    assert sum(page.page_bytes for page in layouts(recipe)) / W == float(lines[-2].split()[-2])
    assert "source: calibrated; model some/Tiny-Model; text text" in lines[-1]
    assert cli.main(["inspect", "missing.json"]) == 1
    assert "does not exist" in capsys.readouterr().err
