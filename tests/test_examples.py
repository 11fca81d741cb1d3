"""Every example runs against stand-ins whose options are checked by vLLM's and this package's own parsers."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fourier_vllm import cli
from fourier_vllm.config import FourierConfig
from fourier_vllm.distributed import batch, vllm_options

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in (ROOT / "examples").glob("*.sh"))
PROGRAMS = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


class FakeLLM:
    """Takes what `vllm.LLM` takes; echoes, and finds every prompt but its last in the cache."""

    def __init__(self, model: str, **options: Any) -> None:
        from vllm.engine.arg_utils import EngineArgs

        known = {field.name for field in dataclasses.fields(EngineArgs)}
        assert set(options) <= known, set(options) - known
        assert options["attention_backend"] == "fourier"
        FourierConfig.from_dict(options.get("additional_config", {}).get("fourier"))
        cache = SimpleNamespace(kv_cache_size_tokens=12345)
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache))

    def chat(self, *args: Any, **options: Any) -> list[SimpleNamespace]:
        from vllm.entrypoints.llm import LLM

        given = inspect.signature(LLM.chat).bind(self, *args, **options).arguments
        words = [word for message in given["messages"] for word in message["content"].split()]
        answer = SimpleNamespace(text=" ".join(words[-3:]), token_ids=[0] * 3)
        output = SimpleNamespace(outputs=[answer], prompt_token_ids=words, num_cached_tokens=7)
        return [output]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs a program with arguments, as from a shell."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fourier_vllm.demo.fetch.fetch", lambda name="smollm2": Path("smollm2"))

    def run(name: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")

    return run


def test_the_index_lists_every_example() -> None:
    index = (ROOT / "examples/README.md").read_text()
    assert [name for name in PROGRAMS + SCRIPTS if f"[{name}]({name})" not in index] == []


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_lists_the_options_of_the_docstring(run, capsys, name: str) -> None:
    with pytest.raises(SystemExit) as stop:
        run(name, "--help")
    assert stop.value.code == 0
    usage, _, _ = capsys.readouterr().out.partition("\n\n")
    documented = re.findall(r"\[(--[a-z-]+)", (ROOT / "examples" / name).read_text())
    assert documented
    assert [option for option in documented if option not in usage] == []


def test_offline(run, monkeypatch, capsys) -> None:
    monkeypatch.setattr("vllm.LLM", FakeLLM)
    run("offline.py", "--recipe", "recipe.json")
    assert "the KV cache holds 12,345 in 256 MiB" in capsys.readouterr().out


def test_multi_turn(run, monkeypatch, capsys) -> None:
    monkeypatch.setattr("vllm.LLM", FakeLLM)
    run("multi_turn.py")
    turns = re.findall(r"turn \d: ([\d,]+) prompt tokens, 7 of them", capsys.readouterr().out)
    assert turns == sorted(turns)
    assert len(turns) == 3


def test_server_and_client(run, monkeypatch, capsys) -> None:
    class FakeServer:
        url = "http://nowhere"

        def __init__(self, model: Path, arguments: list[str], log: Path) -> None:
            vllm_options.parse(arguments, "serve")

        def __enter__(self) -> FakeServer:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    class FakeOpenAI:
        def __init__(self, **options: Any) -> None:
            assert options["base_url"] == "http://nowhere/v1"
            self.chat = SimpleNamespace(completions=self)

        def create(self, **options: Any) -> list[SimpleNamespace]:
            from openai.resources.chat import Completions

            inspect.signature(Completions.create).bind(self, **options)
            piece = SimpleNamespace(delta=SimpleNamespace(content="Red."))
            usage = SimpleNamespace(prompt_tokens=9, completion_tokens=2)
            return [
                SimpleNamespace(choices=[piece], usage=None),
                SimpleNamespace(choices=[], usage=usage),
            ]

    monkeypatch.setattr("fourier_vllm.demo.server.Server", FakeServer)
    monkeypatch.setattr("openai.OpenAI", FakeOpenAI)
    run("server_and_client.py")
    assert capsys.readouterr().out.splitlines()[1:] == ["Red.", "9 tokens read, 2 written"]


def test_ray_data(run, monkeypatch, capsys) -> None:
    def answer(options: batch.Options) -> int:
        vllm_options.parse(options.vllm_args, "batch")
        folder = options.output / "answers"
        folder.mkdir()
        found = [json.loads(line) for line in options.input.read_text().splitlines()]
        rows = [json.dumps({"id": row["id"], "text": "yes"}) for row in found]
        (folder / "0.json").write_text("\n".join(rows))
        return 0

    monkeypatch.setattr(batch, "run", answer)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    run("ray_data.py", "--replicas", "2")
    assert "Japan: yes" in capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_commands_of_scripts(name: str) -> None:
    """Each call of `fourier-vllm` is one that the parsers take."""
    file = ROOT / "examples" / name
    subprocess.run(["bash", "-n", file], check=True)
    found = [shlex.split(line, comments=True) for line in expanded(file.read_text())]
    commands = [words for words in found if words[:1] == ["fourier-vllm"]]
    assert commands
    for words in commands:
        args = cli._parse([word for word in words[1:] if word != "&"])
        vllm_options.parse(getattr(args, "vllm_args", []), args.command)


def expanded(script: str) -> list[str]:
    """Lines of a script with its variables' values, and the command that finds the model."""
    script = script.replace("\\\n", " ")
    values = {"model": "MODEL", "text[@]": "--text FILE"}
    for array, first, more in re.findall(r"^(\w+)=\((--.*)\)()$", script, re.MULTILINE):
        values[f"{array}[@]"] = " ".join([first, more])
    for array, more in re.findall(r"^ *(\w+)\+=\((.*?)\)", script, re.MULTILINE):
        values[f"{array}[@]"] += f" {more}"
    for name, value in values.items():
        script = script.replace(f'"${{{name}}}"', value).replace(f'"${name}"', value)
    fetch = re.findall(r"\$\((fourier-vllm [^)]*)\)", script)
    return [*fetch, *(line for line in script.splitlines() if line.startswith("fourier-vllm"))]
