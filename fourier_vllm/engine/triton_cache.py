"""Where Triton keeps what it compiles."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vllm.logger import init_logger

logger = init_logger("vllm.fourier_vllm")


def settle() -> None:
    """Give Triton a temporary folder where its own cannot be written; it would end the first launch."""
    from triton import knobs

    folder = Path(knobs.cache.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="fourier-vllm-triton-")
        logger.warning_once(
            "fourier: Triton cannot keep what it compiles in %s (%s), so that every start compiles again: "
            "set TRITON_CACHE_DIR to a folder of your own that can be written",
            folder,
            error.strerror,
        )
