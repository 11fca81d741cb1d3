"""The folder where fourier-vllm keeps what it makes, and a lock for what is made once."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """$FOURIER_CACHE, else the platform's cache folder for fourier-vllm."""
    if chosen := os.environ.get("FOURIER_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "fourier-vllm"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"fourier-vllm-{os.getuid()}"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time do what `path` stands for; the lock dies with its process."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
