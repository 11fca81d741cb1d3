"""Words for messages: whatever a user wrote, shown short, on one line and in ASCII."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable

SUBJECT = "attention backend fourier"  # every sentence that ends an engine's start begins with it


def clip(text: str, limit: int) -> str:
    """Cut the middle out of `text` beyond `limit` characters, keeping the telling end of a path."""
    if len(text) <= limit:
        return text
    head = limit // 3
    return f"{text[:head]}...{text[len(text) - (limit - head - 3) :]}"


def show(value: object, limit: int = 50) -> str:
    """Describe `value` in at most about `limit` characters."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        # Python refuses to print integers of thousands of digits.
        return str(value) if value.bit_length() < 64 else "a very large integer"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, (str, os.PathLike)):
        text = value if isinstance(value, str) else os.fsdecode(value)
        return clip(ascii(clip(text, 4096)), limit)
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    return clip(f"a {type(value).__name__}", limit)


def nearest(name: object, valid: Iterable[str]) -> str:
    """The way out for an unknown name: the nearest valid one if close, and all of them."""
    names = list(valid)
    close = difflib.get_close_matches(
        str(name)[:64] if isinstance(name, str) else "", names, 1, 0.5
    )
    hint = f"did you mean {close[0]!r}, " if close else "choose "
    return f"{hint}{'out of' if close else 'one of'} {', '.join(names)}"
