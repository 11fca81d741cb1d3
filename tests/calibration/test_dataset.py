"""Calibration text out of datasets: what counts as one, how much is read, and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fourier_vllm import cli
from fourier_vllm.calibration import dataset as source
from fourier_vllm.calibration.calibrate import Options, text_of
from fourier_vllm.calibration.dataset import Dataset, find_dataset, read_dataset

ROWS = [{"text": f"row {i}", "prose": None if i % 2 else f"prose {i}", "n": i} for i in range(100)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset of one file of JSON lines."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "stories"
    path.mkdir()
    (path / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    return path


def test_what_is_a_dataset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert find_dataset(Path("stories")) == Dataset("stories", None)
    assert find_dataset(Path("stories:en")) == Dataset("stories", "en")
    assert find_dataset(Path("owner/name")) == Dataset("owner/name", None)
    assert find_dataset(Path("owner/name-2:en.v1")) == Dataset("owner/name-2", "en.v1")
    for file in ("stories/train.jsonl", "stories/absent", "absent", "a/b/c", "/absent/x", "../x/y"):
        assert find_dataset(Path(file)) is None
    assert Dataset(str(folder), "en").name == "stories:en"
    assert Dataset("owner/name", None).name == "owner/name"


def test_rows_are_joined(folder: Path) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    found = read_dataset(Dataset(str(folder), None), "text", 10_000)
    assert found == "\n\n".join(str(row["text"]) for row in ROWS)
    found = read_dataset(Dataset(str(folder), None), "prose", 10_000)
    assert found == "\n\n".join(f"prose {i}" for i in range(0, 100, 2))
    assert text_of(Options("m", text=folder, tokens=2)) == ("stories", "row 0\n\nrow 1\n\nro")


def test_files_of_other_types(folder: Path) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    (folder / "train.jsonl").unlink()
    parquet.write_table(
        Table.from_pylist(ROWS), folder / "validation.parquet"
    )  # no split of the name train
    assert read_dataset(Dataset(str(folder), None), "text", 12) == "row 0\n\nrow 1"


def test_no_more_is_read_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def endless(dataset: Dataset):
        while True:
            read.append(0)
            yield {"text": "x" * 98 if len(read) % 2 else None}

    monkeypatch.setattr(source, "_rows", endless)
    assert len(read_dataset(Dataset("a/b", None), "text", 1000)) == 998
    assert len(read) == 19
    monkeypatch.setattr(source, "_rows", lambda _: iter([{"text": "y" * 10**6}]))
    assert read_dataset(Dataset("a/b", None), "text", 1000) == "y" * 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text-column", "txt"], "has no column 'txt': give one of text, prose, n as"),
        (["--text-column", "n"], "column 'n' of dataset 'stories' holds 0, not text"),
    ],
)
def test_wrong_columns(folder: Path, options, message, capsys, monkeypatch) -> None:
    monkeypatch.setattr(source, "_rows", lambda _: iter(ROWS))
    monkeypatch.chdir(folder.parent)
    assert cli.main(["calibrate", "m", "--text", "stories", *options]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_column_of_a_file(folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    assert cli.main(["calibrate", "m", "--text", "train.jsonl", "--text-column", "text"]) == 1
    assert "--text-column is for datasets" in capsys.readouterr().err


def test_without_the_package(folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.chdir(folder.parent)
    assert cli.main(["calibrate", "m", "--text", "stories"]) == 1
    err = capsys.readouterr().err
    assert "needs the package datasets: install it with `pip install 'fourier-vllm[data]'`" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("content", [None, "{broken"])
def test_unreadable_datasets(folder: Path, content: str | None, capsys, monkeypatch) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    file = folder / "train.jsonl"
    file.unlink() if content is None else file.write_text(content)
    monkeypatch.chdir(folder.parent)
    assert cli.main(["calibrate", "m", "--text", "stories"]) == 1
    refusal = capsys.readouterr().err.splitlines()[-1]
    assert refusal.startswith("fourier-vllm calibrate: dataset 'stories' cannot be read (")
