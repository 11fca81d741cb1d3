"""Code blocks of the pages hold: commands parse, options are valid, files exist, Python runs.

A block that cannot be run says why on the line before it, `<!-- not run: WHY -->`; `NUM_EXCUSED` counts them.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fourier_vllm import cli
from fourier_vllm.config import FourierConfig
from tests.docs.markdown import ROOT, Block, blocks, code_spans, pages

BLOCKS = [block for page in pages() for block in blocks(page)]
NUM_EXCUSED = 3  # Python that needs a model, commands that need a GPU, an installation
LANGUAGES = {"bash", "json", "python", "text", "mermaid", "bibtex"}
PLAIN = {
    "ruff",
    "mypy",
    "mkdocs",
    "pre-commit",
    "curl",
    "export",
    "cd",
}  # nothing of ours in their arguments


def commands(text: str) -> list[list[str]]:
    """Words of every command of a shell block, comments and leading assignments left out."""
    found, pending = [], ""
    for line in re.sub(r"\\\n", " ", text).splitlines():
        pending += line
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quotation goes on in the next line
            pending += "\n"
            continue
        pending = ""
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if words:
            found.append(words)
    assert not pending, f"a quotation is not closed: {pending}"
    return found


def check_command(words: list[str]) -> None:
    """Assert what can be known of a command without running it."""
    program, *args = words
    if program == "fourier-vllm":
        cli._parse(args)
    elif program == "vllm":
        assert args[0] in ("serve", "bench"), words
        assert value_of(args, "--attention-backend") == "fourier", words
        check_additional(value_of(args, "--additional-config"))
    elif program == "./run":
        known = re.findall(r"^    ([a-z]+)(?: \||\))", (ROOT / "run").read_text(), re.MULTILINE)
        assert args[0] in known, words
    elif program in ("python", ".venv/bin/python", "pytest"):
        check_python(args if program != "pytest" else ["-m", "pytest", *args])
    elif program == "pip":
        assert args[0] == "install", words
        extras = set(
            re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        )
        for name in args[1:]:
            ours = re.fullmatch(r"(?:fourier-vllm|\.)\[([\w,]+)\]", name)
            assert not ours or set(ours[1].split(",")) <= extras, words
    elif program == "docker":
        assert (ROOT / str(value_of(args, "-f"))).is_file(), words
    elif program == "lm_eval":
        json.loads(value_of(args, "--metadata") or "{}")
        options = value_of(args, "--model_args") or ""
        if options.startswith("{"):
            check_additional(json.dumps(json.loads(options).get("additional_config")))
    else:
        assert program in PLAIN, f"no rule for {program}"


def check_python(args: list[str]) -> None:
    """A module or a script of the repository, and the paths that follow `pytest`."""
    if args[0] == "-m" and args[1].startswith("benchmarks"):
        place = ROOT / args[1].replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), args
    elif args[:2] == ["-m", "pytest"]:
        named = [x.split("::")[0] for x in args[2:] if x.startswith("tests/")]
        assert all((ROOT / name).exists() for name in named), args
    elif args[0] != "-c":
        assert (ROOT / args[0]).is_file(), args


def check_additional(text: str | None) -> None:
    if text is not None:
        FourierConfig.from_dict((json.loads(text) or {}).get("fourier"))


def value_of(args: list[str], option: str) -> str | None:
    return args[args.index(option) + 1] if option in args else None


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.id)
def test_block(block: Block, tmp_path: Path) -> None:
    assert block.language in LANGUAGES, "name the block's language"
    if block.language == "bash":
        for words in commands(block.text):
            check_command(words)
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "python":
        ast.parse(block.text)
        if block.excuse is None:
            code = [sys.executable, "-c", block.text]
            run = subprocess.run(code, cwd=tmp_path, capture_output=True, text=True, timeout=60)
            assert run.returncode == 0, run.stderr


def test_excused_blocks_are_counted() -> None:
    excused = [block.id for block in BLOCKS if block.excuse]
    assert len(excused) == NUM_EXCUSED, excused


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_inline_code(page: Path) -> None:
    names = set(cli.build_parser()._subparsers._group_actions[0].choices)
    for span in code_spans(page):
        if re.match(r"fourier-vllm [a-z]", span):
            assert span.split()[1] in names, span
        found = re.search(r"--additional-config '(\{.*\})'", span)
        if found and "..." not in span:
            check_additional(found[1])


@pytest.mark.parametrize(
    "line",
    [
        "fourier-vllm calibrat MODEL",
        "fourier-vllm calibrate MODEL --taget balanced",
        "vllm serve MODEL --attention-backend fourier --additional-config '{\"fourier\": {\"x\": 1}}'",
        "./run serv",
        "python -m benchmarks.gone",
        "pytest tests/gone.py",
        "pip install 'fourier-vllm[gone]'",
        "frobnicate",
    ],
)  # fmt: skip
def test_a_wrong_command_is_noticed(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((AssertionError, SystemExit, ValueError)):
        check_command(commands(line)[0])
