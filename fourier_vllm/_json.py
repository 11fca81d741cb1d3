"""Strict, bounded JSON files: every failure is one `RecipeError` of one sentence."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from fourier_vllm._text import clip, show

MAX_BYTES = 16 << 20
MAX_MESSAGE = 390
AGAIN = "copy the file again or make it again with `fourier-vllm calibrate`."


class RecipeError(ValueError):
    """A recipe cannot be read, used or written; the message is one sentence with the way out."""

    def __init__(self, message: str) -> None:
        super().__init__(clip(" ".join(message.split()), MAX_MESSAGE))


def read(path: str | os.PathLike[str], origin: str) -> bytes:
    """Bytes of a regular file, at most one more than `MAX_BYTES`."""
    try:
        file = Path(path).expanduser()
        mode = file.stat().st_mode
        # A pipe or a device would never end.
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "a special file"
            raise RecipeError(f"{origin} is {kind}, not a JSON file: give the file itself.")
        with file.open("rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except RecipeError:
        raise
    except FileNotFoundError:
        raise RecipeError(
            f"{origin} does not exist: check the path, or leave the option `recipe` out to get a"
            " recipe that fits the model."
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"{origin} cannot be read ({_reason(error)}): give a readable file."
        ) from None


def parse(text: str | bytes, origin: str) -> object:
    """JSON value of `text` with finite numbers and unique fields; bytes are UTF-8."""
    if len(text) > MAX_BYTES:
        raise RecipeError(
            f"{origin} is larger than {MAX_BYTES >> 20} MiB, which no recipe is: give another file."
        )

    def constant(name: str) -> None:
        raise RecipeError(f"{origin} holds {name} where a finite number was expected: {AGAIN}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) != len(pairs):
            # JSON leaves open which one wins.
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise RecipeError(f"{origin} holds the field {show(twice)} twice: remove one of them.")
        return data

    if not text.strip():
        raise RecipeError(f"{origin} is empty where a JSON object was expected: {AGAIN}")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        return json.loads(text, parse_constant=constant, object_pairs_hook=unique)
    except RecipeError:
        raise
    except UnicodeDecodeError as error:
        raise RecipeError(f"{origin} is not UTF-8 text (at byte {error.start}): {AGAIN}") from None
    except json.JSONDecodeError as error:
        # An unfinished string is reported where it starts.
        cut = error.pos >= len(str(text).rstrip()) or "Unterminated" in error.msg
        kind = "truncated" if cut else "not valid JSON"
        place = f"{error.msg}, line {error.lineno} column {error.colno}"
        raise RecipeError(f"{origin} is {kind} ({place}): {AGAIN}") from None
    except RecursionError:
        raise RecipeError(f"{origin} is nested deeper than any recipe: {AGAIN}") from None
    except ValueError:
        raise RecipeError(f"{origin} holds a number of too many digits: {AGAIN}") from None


def write(path: str | os.PathLike[str], text: str, origin: str) -> None:
    """Replace a file at once: readers see the old text or the new one, never half of one."""
    try:
        file = Path(path).expanduser()
        draft = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            with draft.open("w", encoding="ascii", newline="\n") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(draft, file)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"{origin} cannot be written ({_reason(error)}): give a file in an existing, writable"
            " folder."
        ) from None


def _reason(error: Exception) -> str:
    return clip(ascii(getattr(error, "strerror", None) or str(error)).strip("'\"."), 80)
