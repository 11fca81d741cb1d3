"""Brings a refusal from the process that found it to the one that the user started.

What only a layer shows is found by the engine core or by a worker. vLLM logs its traceback there, in the
middle of hundreds of lines, and ends with "Engine core initialization failed". Here the log's record leaves
the sentence in a file, and the user's process raises it as its own last words.
"""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from functools import wraps
from pathlib import Path
from typing import Any

from fourier_vllm._text import SUBJECT

VARIABLE = "FOURIER_REFUSAL_FILE"  # inherited by the processes that this one starts


class Messenger(logging.Handler):
    """Leaves the first refusal that is logged as an exception in a file."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        sentence = sentence_of(error)
        if sentence:
            try:
                with Path(os.environ[VARIABLE]).open("x", encoding="utf-8") as file:
                    file.write(sentence)
            except (KeyError, OSError):  # another process was first, or there is no room
                pass


def sentence_of(error: BaseException | None) -> str | None:
    """The refusal that ends an exception's text: Ray puts a traceback before it."""
    lines = str(error).strip().splitlines() or [""]
    _, found, rest = lines[-1].partition(SUBJECT)
    return found + rest if found else None


def speak() -> None:
    """Write down refusals, in a process whose parent listens."""
    logger = logging.getLogger("vllm")
    if VARIABLE in os.environ and not any(isinstance(x, Messenger) for x in logger.handlers):
        logger.addHandler(Messenger(logging.ERROR))


def listen() -> None:
    """Raise what an engine writes down while it starts; a second call does nothing."""
    from vllm.v1.engine import utils

    if hasattr(utils.wait_for_engine_startup, "__wrapped__"):
        return
    original = utils.wait_for_engine_startup
    file = Path(tempfile.gettempdir()) / f"fourier-vllm-{os.getpid()}-{secrets.token_hex(8)}"
    os.environ[VARIABLE] = str(file)

    @wraps(original)
    def wait_for_engine_startup(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except RuntimeError:
            if not file.exists():
                raise
            sentence = file.read_text(encoding="utf-8")
            file.unlink()
        raise ValueError(sentence)

    utils.wait_for_engine_startup = wait_for_engine_startup
