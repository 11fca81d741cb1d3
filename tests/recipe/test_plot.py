"""Pictures of recipes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fourier_vllm import cli
from fourier_vllm.recipe import ModelFingerprint, Recipe, target_recipe
from fourier_vllm.recipe.plot import flat, stretched


def recipe_of(target: str = "paper", layers: int = 3) -> Recipe:
    model = ModelFingerprint(
        architecture="LlamaForCausalLM",
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_size=32,
    )
    return target_recipe(model, target)


def mixed() -> Recipe:
    """V by the token codec in one layer and by dim in the others."""
    data = recipe_of().model_dump()
    data["layers"][1]["v"] = 3
    return Recipe.from_dict(data)


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe_of(), id="V-by-dim"),
        pytest.param(recipe_of("lossless"), id="V-by-token"),
        pytest.param(mixed(), id="mixed"),
        pytest.param(recipe_of("lossless", 1), id="one-layer"),
    ],
)
def test_both_suffixes(recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    recipe.save(tmp_path / "r.json")
    for name, start in (("bits.png", b"\x89PNG"), ("bits.svg", b"<?xml")):
        assert cli.main(["inspect", str(tmp_path / "r.json"), "--plot", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(start)


def test_rows() -> None:
    assert flat([[0, 2], [4, 8]]) == [0, 2, 4, 8]
    assert stretched([[3], [0, 16]]) == [[3, 3], [0, 16]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bits.pdf", "--plot must end in .png or .svg"),
        ("no/such/folder.png", "give a file in an existing, writable folder"),
    ],
)
def test_refusals(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    recipe_of().save(tmp_path / "r.json")
    assert cli.main(["inspect", str(tmp_path / "r.json"), "--plot", str(tmp_path / name)]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    recipe_of().save(tmp_path / "r.json")
    assert cli.main(["inspect", str(tmp_path / "r.json"), "--plot", "bits.png"]) == 1
    assert "--plot needs matplotlib" in capsys.readouterr().err
