"""Where and with what a number was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("fourier-vllm", "torch", "transformers", "numpy")


def machine(device: str) -> dict[str, str | int | None]:
    """The device's name and the CPU, in words."""
    import torch

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    return {
        "device": name,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def versions(*more: str) -> dict[str, str]:
    """Installed versions of what a result depends on, and of `more` packages."""
    found = {}
    for package in (*PACKAGES, *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "from source"
    return found


def commit() -> str | None:
    """The commit of this package's checkout, marked when changed; None outside of one.

    A tree that was copied to another machine has no checkout: FOURIER_COMMIT says what it was.
    """
    if told := os.environ.get("FOURIER_COMMIT"):
        return told
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).resolve().parent
    try:
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
