"""The command under test."""

from __future__ import annotations

import sys
from pathlib import Path


def fourier_vllm() -> str:
    """The script of this environment."""
    return str(Path(sys.executable).with_name("fourier-vllm"))
