"""The Ray tier: real clusters of this machine, SmolLM2 on the CPU, one command after another."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything below this folder starts Ray."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.ray)
            if find_spec("ray") is None:
                item.add_marker(pytest.mark.skip(reason="Ray is not installed: .[ray]"))


@pytest.fixture(scope="session")
def environment(root: Path) -> dict[str, str]:
    """Of a process that starts its own cluster, whatever else runs on this machine."""
    return os.environ | {
        "PYTHONPATH": str(root),
        "RAY_ADDRESS": "local",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # engines share the cores
        "OMP_NUM_THREADS": "1",
    }
