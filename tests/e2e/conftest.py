"""Engines run in the test process, one after the other."""

from __future__ import annotations

import os
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
    from tests.e2e.toys import make_toy

    folder = tmp_path_factory.mktemp("toys")
    return lambda family="llama": make_toy(folder, family)
