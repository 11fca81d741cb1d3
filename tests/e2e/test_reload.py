"""Weights that take the place of those an engine started with."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.engine import LOSSLESS, engine, generate, prompts, tokens


def others(folder: Path, target: Path) -> Path:
    """A model of the same shape and other weights."""
    file = copytree(folder, target) / "model.safetensors"
    weights = load_file(file)
    save_file({k: torch.roll(x, 1, -1) for k, x in weights.items()}, file, {"format": "pt"})
    return target


def answers(llm: Any) -> list[list[int]]:
    return tokens(generate(llm, prompts()[2:4], 8))


def test_other_weights_give_their_tokens(toy, tmp_path):
    other = others(toy(), tmp_path / "other")
    with engine(other) as llm:
        expected = answers(llm)
    with engine(toy(), LOSSLESS) as llm:
        assert answers(llm) != expected
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
        llm.reset_prefix_cache()
        assert answers(llm) == expected


def test_a_recipe_of_dummies_is_not_kept(toy):
    derived = LOSSLESS | {"target": "balanced"}
    with engine(toy(), derived, load_format="dummy") as llm:
        llm.collective_rpc("update_config", args=({"load_config": {"load_format": "auto"}},))
        with pytest.raises(ValueError, match="derived its recipe from dummy weights"):
            llm.collective_rpc("reload_weights")
