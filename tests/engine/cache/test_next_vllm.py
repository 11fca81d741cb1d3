"""The tests of what this package takes from vLLM, on the Python sources of the newest supported release.

It has no CPU build, see `tests/support/next_vllm.py`: without this test no CI on a CPU would see what it
changes.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.next_vllm import overlay

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """Runs pytest on that release; returns what it printed."""
    folder = overlay(tmp_path_factory.mktemp("next"))

    def run(*arguments: str, **environment: str) -> str:
        paths = os.pathsep.join([str(folder), str(root)])
        process = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
            env=os.environ | {"PYTHONPATH": paths} | environment,
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1200,
        )
        assert process.returncode == 0, process.stdout[-20000:]
        return process.stdout

    return run


def test_tables_of_its_runner(run):
    """Its own gather, in Triton's interpreter: the pinned blocks stay."""
    printed = run("tests/engine/cache/test_worker_tables.py", TRITON_INTERPRET="1")
    assert "3 passed" in printed, printed  # they are skipped on vLLM 0.32


def test_its_planner_scheduler_and_interfaces(run):
    names = ("cache", "cpu/test_plan.py", "test_metadata.py", "test_upstream.py")
    folders = (f"tests/engine/{name}" for name in names)
    run(*folders, "-m", "not slow", "-n", "2", FOURIER_FUZZ_SECONDS="10")


def test_its_engine_beside_stock(run):
    run("tests/e2e/test_token_identity.py::test_preemption_and_recompute[windowed-30]")
