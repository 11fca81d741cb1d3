"""Tables and plots from a small results file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fourier_vllm import cli
from fourier_vllm.evaluation import machine
from fourier_vllm.evaluation.report import markdown, write
from fourier_vllm.evaluation.results import Rows, load


@pytest.fixture
def data() -> dict:
    families = {"exact": "exact", "balanced": "fourier", "kivi2": "kivi", "streaming": "streaming"}
    rows = Rows(families)
    for i, (name, bits) in enumerate(zip(families, (16.0, 2.5, 2.5, 0.0), strict=True)):
        rows.bits[name].append(bits)
        rows.add(name, "nll", {"nll": 2 + i / 10, "kl": i / 100})
        for right in (0.0, 1.0, 1.0 * (i == 0)):
            rows.add(name, "multikey", {"right": right, "share": right, "logp": -0.5 - i})
        rows.add(name, "agreement", {"same": 1 - i / 4, "prefix": 256.0 - i})
    return {
        "format": 1,
        "model": "tiny",
        "settings": dict(context=900, start=16, end=640, seed=0, dtype="float32", text="manuals"),
        "machine": {"device": "cpu"},
        "versions": {"torch": "2"},
        "commit": "abc",
        "documents_done": 3,
        "seconds": 1.0,
        "rows": rows.dump(),
    }


def test_table(data: dict) -> None:
    caption, blank, *lines = markdown(data).split("\n")
    assert "tiny, 3 documents (manuals), contexts of 900 tokens" in caption
    assert "commit abc" in caption
    assert not blank
    assert lines == [
        "| format | bits | smaller by | KL | NLL | multikey | multikey log p | agreement"
        " | common prefix |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| `exact` | 16.00 | 1.00x | 0.0000 | +0.0000 | 2/3 | -0.500 | 1.000 | 256 |",
        "| `balanced` | 2.50 | 6.40x | 0.0100 | +0.1000 | 1/3 | -1.500 | 0.750 | 255 |",
        "| `kivi2` | 2.50 | 6.40x | 0.0200 | +0.2000 | 1/3 | -2.500 | 0.500 | 254 |",
        "| `streaming` | 0.00 | - | 0.0300 | +0.3000 | 1/3 | -3.500 | 0.250 | 253 |",
        "",
        "| format | bits | KL | best of ours at no more bits | bits | KL |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| `kivi2` | 2.50 | 0.0200 | `balanced` | 2.50 | 0.0100 |",
    ]


def test_no_second_table_without_bytes_to_compare(data: dict) -> None:
    data["rows"][1]["bits"] = 2.6  # more than kivi2
    assert "no more bits" not in markdown(data)
    for row in data["rows"]:
        del row["tasks"]["nll"]
    assert "KL" not in markdown(data)


def test_report_command(data: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "results.json"
    file.write_text(json.dumps(data))
    assert cli.main(["report", str(file)]) == 0
    assert markdown(data) in capsys.readouterr().out
    assert (tmp_path / "results.md").read_text() == markdown(data) + "\n"
    for task in ("nll", "multikey", "agreement"):
        assert (tmp_path / f"{task}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / f"{task}.svg").read_text()
    assert not (tmp_path / "vartrack.png").exists()


def test_without_matplotlib(data: dict, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "fourier_vllm.evaluation.plots", raising=False)
    assert "install matplotlib" in write(data, tmp_path)
    assert (tmp_path / "results.md").exists()


def test_needs_neither_vllm_nor_matplotlib() -> None:
    code = """
import sys
sys.modules |= dict.fromkeys(("vllm", "matplotlib"))  # importing one raises ImportError
import fourier_vllm.evaluation.evaluate, fourier_vllm.evaluation.report
import fourier_vllm.recipe.plot
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "are not JSON"),
        ("[]", "have another format"),
        ('{"format": 2}', "have another format"),
        ('{"format": 1}', "lack model"),
        (
            '{"format": 1, "model": "", "settings": {}, "documents_done": 0, "rows": []}',
            "lack rows",
        ),
    ],
)
def test_other_files_are_refused(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(
        ValueError, match=f"{message}.*: give a file that `fourier-vllm eval` wrote"
    ):
        load(file)


def test_commit_outside_of_a_checkout(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "machine.py"))
    assert machine.commit() is None
    monkeypatch.setenv("PATH", "")
    assert machine.commit() is None


def test_versions_without_a_package(monkeypatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", ("no-such-package",))
    assert machine.versions() == {"no-such-package": "from source"}
