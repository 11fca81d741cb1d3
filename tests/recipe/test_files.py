"""Recipes in files: paths, failed writes, and those that ship."""

import importlib.resources
import json
import os

import pytest

from fourier_vllm.recipe import (
    TARGETS,
    Recipe,
    RecipeError,
    find_bundled,
)
from tests.support.recipes import MODEL, VALID, checked


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/nowhere/r.json", "does not exist"),
        ("/tmp", "is a directory"),
        ("/dev/zero", "special file"),
        ("a\0b", "cannot be read"),
        ("x" * 5000, "cannot be read"),
        ("~no_such_user/r.json", "cannot be read"),
        ("two\nlines.json", "does not exist"),
    ],
)
def test_refuses_paths(path, word):
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path)
    assert word in checked(caught.value)


@pytest.mark.parametrize("path", ["/nowhere/r.json", "/tmp", "", "a\0b"])
def test_refuses_to_save(path):
    with pytest.raises(RecipeError) as caught:
        Recipe.loads(json.dumps(VALID)).save(path)
    assert "cannot be written" in checked(caught.value)


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    path.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecipeError, match="No space left"):
        Recipe.loads(json.dumps(VALID)).save(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["r.json"]


def test_find_bundled(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.resources, "files", lambda _: tmp_path)
    recipe = Recipe.loads(json.dumps(VALID))
    (tmp_path / "a.json").write_text("broken")
    (tmp_path / "b.txt").write_text("no recipe")
    (tmp_path / "c.json").write_text(recipe.dumps())
    (tmp_path / "d.json").write_text(recipe.model_copy(update={"name": "quality"}).dumps())
    assert find_bundled(MODEL, "balanced") == recipe
    assert find_bundled(MODEL, "quality").name == "quality"
    assert find_bundled(MODEL, "compact") is None
    assert find_bundled(MODEL.model_copy(update={"num_layers": 3}), "balanced") is None


def test_every_bundled_recipe_loads():
    for file in importlib.resources.files("fourier_vllm.recipes").iterdir():
        if file.name.endswith(".json"):
            recipe = Recipe.loads(file.read_bytes(), file.name)
            assert recipe.name in TARGETS
