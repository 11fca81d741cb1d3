"""Engines run in the test process, one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything below this folder starts vLLM."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory):
    """Maker of toy models: `toy("llama")` is a folder."""
    from tests.support.toys import make_toy

    folder = tmp_path_factory.mktemp("toys")
    return lambda family="llama": make_toy(folder, family)


@pytest.fixture(scope="session")
def run_apart(root: Path):
    """Runs a module in a process: `run_apart("tests.support.images", folder)` is what it prints."""

    def run(module: str, argument: Path, *path: Path):
        result = subprocess.run(
            [sys.executable, "-m", module, str(argument)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [root, *path]))},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(result.stdout.splitlines()[-1])

    return run
