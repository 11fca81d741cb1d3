"""Measured recipes are found again, and only for the weights and the model that they were measured on."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from fourier_vllm.engine.measure import kept
from fourier_vllm.recipe import Recipe, target_recipe
from tests.support.recipes import MODEL


def made() -> Recipe:
    return target_recipe(MODEL, "paper", 32)


def anything(recipe: Recipe) -> bool:
    return True


def test_made_once(tmp_path):
    file = tmp_path / "cache" / "r.json"
    first = kept.find_or_make(file, anything, made)
    again = kept.find_or_make(file, anything, lambda: pytest.fail("made again"))
    assert first == (made(), file, True)
    assert again == (made(), file, False)


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b'{"format": 99}'])
def test_damaged(tmp_path, damage):
    file = tmp_path / "r.json"
    file.write_bytes(damage)
    assert kept.find_or_make(file, anything, made).is_new
    assert Recipe.load(file) == made()


def test_of_another_model(tmp_path):
    file = tmp_path / "r.json"
    kept.find_or_make(file, anything, made)
    assert kept.find_or_make(file, lambda recipe: False, made).is_new


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    assert kept.find_or_make(tmp_path / "file" / "r.json", anything, made) == (made(), None, True)


def test_two_at_once(tmp_path):
    calls = []

    def slowly() -> Recipe:
        calls.append(1)
        time.sleep(0.2)
        return made()

    arguments = (tmp_path / "r.json", anything, slowly)
    threads = [threading.Thread(target=kept.find_or_make, args=arguments) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_what_makes_another_digest():
    def module(change: float = 0.0, dtype=torch.float32, transposed: bool = False) -> nn.Module:
        torch.manual_seed(0)
        weight = torch.randn(30, 20)
        weight[-1, -1] += change
        weight[0, 0] += change
        data = weight.to(dtype)
        one = nn.Module()
        one.weight = nn.Parameter(data.T if transposed else data, requires_grad=False)
        one.scale = nn.Parameter(torch.tensor(2.0 + change))
        one.none = nn.Parameter(torch.empty(0))
        return one

    plain = kept.digest_of(module())
    assert kept.digest_of(module()) == plain
    others = [
        module(1.0),
        module(dtype=torch.bfloat16),
        module(dtype=torch.float8_e4m3fn),
        module(transposed=True),
        module(1.0, torch.float8_e4m3fn, transposed=True),
        module(0.0, torch.float8_e4m3fn, transposed=True),
    ]
    assert len({plain, *map(kept.digest_of, others)}) == 7


def test_names_of_files():
    name = kept.file_name("org/Some-Model", "compact", [1, "a"])
    assert name.startswith("some-model-compact-")
    assert Path(name).suffix == ".json"
    assert kept.file_name("org/Some-Model", "compact", [1, "b"]) != name


def test_a_text_that_is_not_there(tmp_path):
    assert kept.digest_of_file(tmp_path / "nothing") is None
