"""An interrupted `calibrate` goes on; damaged progress and full disks are named."""

from pathlib import Path

import pytest
import torch

from fourier_vllm.calibration import calibrate as calibration
from fourier_vllm.calibration.progress import Progress
from fourier_vllm.recipe import Recipe
from tests.support.tiny import calibrate


def test_an_interrupted_command_goes_on(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    lengths = ["--tokens", "600", "-o", "whole.json"]
    monkeypatch.setattr(calibration, "DOCUMENT_TOKENS", 256)
    assert calibrate(folder, *lengths) == 0
    progress = folder / "r.json.progress.npz"
    save = Progress.save

    def stop(self, num_done, sums):
        save(self, num_done, sums)
        raise KeyboardInterrupt

    lengths[-1] = "r.json"
    monkeypatch.setattr(Progress, "save", stop)
    assert calibrate(folder, *lengths) == 130
    assert progress.exists()
    monkeypatch.setattr(Progress, "save", save)
    capsys.readouterr()
    assert calibrate(folder, *lengths) == 0
    assert "1 of 3 documents done" in capsys.readouterr().out
    assert not progress.exists()
    assert Recipe.load("r.json").layers == Recipe.load("whole.json").layers


@pytest.mark.parametrize("change", ["weights", "text", "sink tokens"])
def test_progress_of_another_run_is_not_mixed_in(folder, capsys, monkeypatch, llama, change):
    monkeypatch.chdir(folder)
    save, stops = Progress.save, [True]

    def stop(self, num_done, sums):
        save(self, num_done, sums)
        if stops:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "save", stop)
    options = ["-o", "r.json"]
    assert calibrate(folder, *options) == 130
    stops.clear()
    if change == "weights":
        with torch.no_grad():
            llama.model.layers[0].self_attn.k_proj.weight.mul_(2)
    elif change == "text":
        (folder / "text").write_text(" ".join(str(i * 7 % 97) for i in range(600)))
    else:
        options += ["--sink-tokens", "0"]
    assert calibrate(folder, *options) == 0
    out = capsys.readouterr().out
    assert "r.json.progress.npz is of another model, text or options: starting anew" in out
    assert "documents done" not in out
    assert calibrate(folder, *options, "-o", "anew.json") == 0
    assert Recipe.load("r.json").layers == Recipe.load("anew.json").layers


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"text", b"\x93NUMPY\x01\x00"])
def test_damaged_progress_is_named(folder, capsys, monkeypatch, content):
    monkeypatch.chdir(folder)
    Path("r.json.progress.npz").write_bytes(content)
    assert calibrate(folder, "-o", "r.json") == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == (
        "fourier-vllm calibrate: progress 'r.json.progress.npz' is damaged or cannot be read: delete"
        " it to start anew."
    )
    assert Path("r.json.progress.npz").read_bytes() == content


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("name", ["r.json.progress.npz.part", ".r.json."])
def test_a_full_disk(folder, capsys, monkeypatch, name):
    """Writes of one file go where there is never any room."""
    monkeypatch.chdir(folder)
    Path("r.json").write_text("an older recipe")
    opened, real = [], Path.open

    def open_(self, mode="r", *args, **options):
        file = real(self, mode, *args, **options)
        if "w" in mode and self.name.startswith(name):
            opened.append(self)
            file.close()
            return real(Path("/dev/full"), mode, *args, **options)
        return file

    monkeypatch.setattr(Path, "open", open_)
    assert calibrate(folder, "-o", "r.json") == 1
    refusal = capsys.readouterr().err.splitlines()[-1]
    assert refusal.startswith("fourier-vllm calibrate: ")
    assert "cannot be written (No space left on device)" in refusal
    assert opened
    assert Path("r.json").read_text() == "an older recipe"
    # What was measured is kept where only the recipe could not be written.
    left = {"text", "r.json"} | ({"r.json.progress.npz"} if name == ".r.json." else set())
    assert {file.name for file in folder.iterdir()} == left
