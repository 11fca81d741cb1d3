"""The command line: quick to help, one sentence per refusal."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from fourier_vllm import cli, doctor


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, fourier_vllm.cli as c; c.build_parser().format_help(); "
        "print({'torch', 'vllm', 'transformers', 'requests', 'numpy'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_refusal_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "something").touch()
    assert cli.main(["fetch", "--output", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("fourier-vllm fetch: ")
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(ValueError, match="not made by fetch"):
        cli.main(["--debug", "fetch", "--output", str(tmp_path)])


def test_unknown_choice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["fetch", "gpt5"])
    assert stop.value.code == 2
    assert "smollm2" in capsys.readouterr().err


def test_arguments_after_the_dashes_go_to_vllm() -> None:
    args = cli.build_parser().parse_args(["demo", "--keep", "--", "--max-num-seqs", "4"])
    assert args.keep
    assert args.vllm_args == ["--max-num-seqs", "4"]


@pytest.fixture
def vllm_version(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions that importlib.metadata pretends to know."""
    versions: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.metadata, "version", version)
    return versions


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("0.31.0", "vLLM 0.31.0 is not supported: install vllm"),
        ("0.32.0+cpu", ""),
        ("0.33.0", ""),
        ("0.33.1rc1", ""),
        ("0.34.0", "vLLM 0.34.0 is not supported"),
    ],
)
def test_supported_versions(version: str, problem: str, vllm_version: dict[str, str]) -> None:
    vllm_version["vllm"] = version
    found = doctor.check_vllm_version().problem
    assert found.startswith(problem)
    assert bool(found) == bool(problem)


def test_no_vllm(vllm_version: dict[str, str]) -> None:
    assert "./run install" in doctor.check_vllm_version().problem


def test_plugin_kept_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert not doctor.check_entry_point().problem
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    assert "add fourier or unset it" in doctor.check_entry_point().problem


@pytest.mark.parametrize(
    ("device", "words"), [("cuda", "measured at the first start"), ("cpu", "predicted from the")]
)
def test_where_recipes_come_from(monkeypatch: pytest.MonkeyPatch, device: str, words: str) -> None:
    import vllm.platforms

    platform = SimpleNamespace(
        is_cuda=lambda: device == "cuda",
        is_cpu=lambda: device == "cpu",
        get_device_name=lambda: "a GPU",
    )
    monkeypatch.setattr(vllm.platforms, "current_platform", platform)
    (line,) = (x for x in doctor.describe_device() if x.topic == "recipe")
    assert line.value.startswith("a model without a recipe")
    assert words in line.value


def test_a_problem_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "diagnose", lambda: iter([doctor.Finding("vllm", "-", "Do it.")]))
    assert doctor.report() == 1
    assert "PROBLEM: Do it." in capsys.readouterr().out
