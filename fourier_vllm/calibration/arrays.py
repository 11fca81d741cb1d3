"""Files of named arrays, as an interrupted calibration leaves them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from fourier_vllm._text import show


def save_arrays(path: Path, what: str, arrays: dict[str, Any]) -> None:
    """Write an .npz file atomically.

    Parameters
    ----------
    what : str
        What the file is, for the message.

    Raises
    ------
    ValueError
        It cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ValueError(
            f"{what} {show(path, 120)} cannot be written ({error.strerror or type(error).__name__}):"
            " make room, or give another --output."
        ) from None
