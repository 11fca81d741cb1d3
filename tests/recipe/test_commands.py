"""`fourier-vllm recipes`: the folder of measured recipes from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fourier_vllm.cli import main
from fourier_vllm.recipe import ModelFingerprint, Provenance, Recipe, target_recipe
from fourier_vllm.recipe.describe import describe, ratio_of

MODEL = ModelFingerprint(
    architecture="LlamaForCausalLM", num_layers=2, num_heads=4, num_kv_heads=2, head_size=32
)
ONE, OTHER = "tiny-balanced-0123456789abcdef.json", "tiny-compact-fedcba9876543210.json"
DAMAGED = "broken-balanced-00ff00ff00ff00ff.json"


def recipe_of(target: str) -> Recipe:
    origin = Provenance(
        source="measured", date="2026-01-02", text="texts of fourier-vllm", model="org/Tiny"
    )
    return target_recipe(MODEL, target).model_copy(update={"provenance": origin})


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, which is made at the first measurement."""
    monkeypatch.setenv("FOURIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "recipes"


@pytest.fixture
def folder(empty: Path) -> Path:
    """Two recipes of one model, a damaged file, and what else lies there."""
    empty.mkdir(parents=True)
    recipe_of("paper").save(empty / ONE)
    recipe_of("lossless").save(empty / OTHER)
    (empty / DAMAGED).write_text((empty / ONE).read_text()[:500])
    for name in (ONE, OTHER, DAMAGED, "being-measured.json"):
        (empty / name).with_suffix(".lock").touch()
    (empty / f".{ONE}.17.tmp").touch()
    (empty / "folder.json").mkdir()
    return empty


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("*.json") if file.is_file()}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """Run a command that works; what it prints."""

    def run(*arguments: str) -> list[str]:
        assert main(["recipes", *arguments]) == 0
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """Run a command that is refused; its sentence."""

    def refused(*arguments: str) -> str:
        assert main(["recipes", *arguments]) == 1
        out, err = capsys.readouterr()
        assert not out
        assert err.startswith("fourier-vllm recipes: ")
        assert err.endswith(".\n")
        assert err.count("\n") == 1
        return err

    return refused


@pytest.mark.parametrize("arguments", [(), ("list",)])
def test_list(run, folder, arguments):
    head, damaged, one, other, total = run(*arguments)
    assert head.split() == ["file", "target", "model", "ratio", "source", "date"]
    assert damaged.split() == [DAMAGED, "damaged"]
    facts = ["org/Tiny", f"{ratio_of(recipe_of('paper')):.2f}", "measured", "2026-01-02"]
    assert one.split() == [ONE, "paper", *facts]
    assert other.split()[:2] == [OTHER, "lossless"]
    assert total == f"3 recipes in {folder}"
    assert len({line.index(word) for line, word in ((head, "model"), (one, "org/"))}) == 1


def test_a_recipe_with_little_provenance(run, empty):
    empty.mkdir(parents=True)
    target_recipe(MODEL, "paper").save(empty / "r.json")
    _, line, total = run()
    assert line.split()[:3] == ["r.json", "paper", "LlamaForCausalLM"]
    assert total == f"1 recipe in {empty}"


def test_nothing_there(run, refused, empty):
    assert run() == [f"no recipes in {empty}"]
    assert run("remove", "--all") == []
    assert "no recipe, found the name 'x'" in refused("show", "x")
    empty.parent.mkdir()
    empty.touch()
    assert run() == [f"no recipes in {empty}"]


def test_a_folder_that_cannot_be_read(refused, folder, monkeypatch):
    def forbidden(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", forbidden)
    assert "cannot be read (Permission denied): set FOURIER_CACHE" in refused()


@pytest.mark.parametrize("name", [ONE, ONE.removesuffix(".json"), "tiny-b"])
def test_show(run, folder, name):
    assert run("show", name) == describe(recipe_of("paper")).splitlines()


@pytest.mark.parametrize("command", [("show",), ("remove",), ("export", "-o", "r.json")])
def test_names(refused, folder, command):
    message = refused(*command, "tiny-")
    assert f"'tiny-' begins the names {ONE}, {OTHER}: write more" in message
    message = refused(*command, "tiny-compat")
    assert f"no recipe is called 'tiny-compat': choose one of {DAMAGED}, {ONE}, {OTHER}." in message
    for unknown in ("", "../recipes/" + ONE, "being-measured", "folder.json"):
        assert "no recipe is called" in refused(*command, unknown)
    assert len(names(folder)) == 3


def test_a_whole_name_that_begins_another(run, folder):
    (folder / "tiny.json").write_text((folder / ONE).read_text())
    assert run("remove", "tiny") == [f"removed {folder / 'tiny.json'}"]


def test_a_damaged_file(run, refused, folder, tmp_path):
    for command in (("show",), ("export", "-o", str(tmp_path / "r.json"))):
        assert f"{DAMAGED} is damaged: remove it with" in refused(*command, "broken")
    assert run("remove", "broken") == [f"removed {folder / DAMAGED}"]
    assert names(folder) == {ONE, OTHER}


def test_remove(run, refused, folder):
    assert "no recipe is called 'gone'" in refused("remove", "tiny-c", "gone")
    assert names(folder) == {ONE, OTHER, DAMAGED}
    assert len(run("remove", "tiny-c", OTHER, "broken")) == 2
    assert names(folder) == {ONE}
    locks = {file.name for file in folder.glob("*.lock")}
    assert locks == {Path(ONE).with_suffix(".lock").name, "being-measured.lock"}


def test_remove_all(run, refused, folder):
    for wrong in ((), ("--all", ONE)):
        assert "takes names or --all" in refused("remove", *wrong)
    assert len(run("remove", "--all")) == 3
    assert not names(folder)
    assert [file.name for file in folder.glob("*.lock")] == ["being-measured.lock"]


def test_a_file_that_cannot_be_removed(refused, folder, monkeypatch):
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", forbidden)
    assert "cannot be removed (Permission denied)" in refused("remove", ONE)


def test_export(run, refused, folder, tmp_path):
    copy = tmp_path / "copy.json"
    assert run("export", "tiny-b", "-o", str(copy)) == [str(copy)]
    assert copy.read_bytes() == (folder / ONE).read_bytes()
    assert "copy.json exists" in refused("export", "tiny-c", "-o", str(copy))
    assert copy.read_bytes() == (folder / ONE).read_bytes()
    run("export", "tiny-c", "-o", str(copy), "--force")
    assert Recipe.load(copy) == recipe_of("lossless")
    assert "cannot be written" in refused("export", "tiny-c", "-o", str(tmp_path / "no" / "r.json"))
    assert names(folder) == {ONE, OTHER, DAMAGED}


def test_export_into_the_home_folder(run, refused, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("export", "tiny-b", "--output=~/r.json") == [str(tmp_path / "r.json")]
    assert "exists" in refused("export", "tiny-b", "--output=~/r.json")


def test_needs_neither_torch_nor_vllm(folder):
    code = (
        "import sys; from fourier_vllm.cli import main; "
        f"main(['recipes']); main(['recipes', 'show', {ONE!r}]); "
        "sys.exit(bool({'torch', 'vllm', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
