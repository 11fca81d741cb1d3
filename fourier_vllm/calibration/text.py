"""Calibration text: a file of the user's, or a book that every Python installation has."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourier_vllm._text import show

DOCUMENT_TOKENS = 4096
MIN_PAGES = 8
MAX_BYTES = 64 << 20


def read_text(path: Path | None) -> tuple[str, str]:
    """Name and content of the text; None is Python's own language reference.

    Raises
    ------
    ValueError
        The file cannot be read, is no UTF-8 text or is larger than 64 MiB.
    """
    if path is None:
        from pydoc_data.topics import topics

        return (
            f"pydoc_data.topics of Python {platform.python_version()}",
            "\n\n".join(topics[name] for name in sorted(topics)),
        )
    file = path.expanduser()
    try:
        if not file.is_file() and file.exists():
            raise ValueError(f"text {show(path, 120)} is not a file: give a plain text file.")
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(
                f"text {show(path, 120)} is larger than {MAX_BYTES >> 20} MiB: give a part of it."
            )
        return file.name, data.decode("utf-8-sig")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ValueError(
            f"text {show(path, 120)} cannot be read ({reason}): give a readable UTF-8 file."
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text {show(path, 120)} is not UTF-8 (at byte {error.start}): give a plain text file."
        ) from None


def cut(
    tokenizer: Any, text: str, tokens: int, page_size: int, longest: int = DOCUMENT_TOKENS
) -> list[Tensor]:
    """Documents of equal length, spread evenly over the text.

    Parameters
    ----------
    tokens : int
        Tokens of all documents together; fewer where the text is shorter.
    page_size : int
        Eight pages are the least that says something about a model.
    longest : int
        Tokens of a document, at most.

    Returns
    -------
    list of Tensor [T], int64
        Each starts as the model's texts do, with its beginning-of-text token if it has one.

    Raises
    ------
    ValueError
        Text, `tokens` or the model's context are too short.
    """
    least = check_length(tokens, longest, page_size)
    ids = encode(tokenizer, text)
    if len(ids) < least:
        raise ValueError(
            f"text has {len(ids)} tokens, and pages of {page_size} need {least}: give a longer one."
        )
    return spread(ids, first_token(tokenizer), tokens, longest)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text of any length, without the first token that the model's texts have."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def first_token(tokenizer: Any) -> list[int]:
    """The beginning-of-text token, or nothing if the model's texts have none."""
    start: list[int] = tokenizer("").input_ids[:1]
    return start if start and start[0] == tokenizer.bos_token_id else []


def spread(ids: list[int], start: list[int], tokens: int, longest: int) -> list[Tensor]:
    """Documents of equal length from all over `ids`, as `cut` gives them, each behind `start`."""
    total = min(tokens, len(ids))
    count = -(-total // longest)
    size = total // count - len(start)
    stride = len(ids) // count
    return [torch.tensor(start + ids[i * stride : i * stride + size]) for i in range(count)]


def check_length(tokens: int, longest: int, page_size: int) -> int:
    """The least tokens of a document; raises ValueError where `tokens` or `longest` are fewer."""
    least = MIN_PAGES * page_size
    if min(tokens, longest) < least:
        name = "--tokens" if tokens < longest else "the model's context"
        raise ValueError(
            f"{name} must be at least {least} tokens for pages of {page_size}, found"
            f" {min(tokens, longest)}: choose more, or a smaller --page-size."
        )
    return least
