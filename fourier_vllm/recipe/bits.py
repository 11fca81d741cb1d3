"""Field types of the schema: bits of dims, and integers that are exactly that."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import PlainValidator
from pydantic_core import PydanticCustomError

from fourier_vllm._text import show

CHANNEL_BITS = (0, 2, 4, 8, 16)
TOKEN_BITS = (2, 3, 4, 8, 16)


def wrong(message: str) -> PydanticCustomError:
    # The text travels as a value, so that braces in it are no placeholders.
    return PydanticCustomError("recipe", "{message}", {"message": message})


def as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _rows(value: object) -> tuple[tuple[int, ...], ...]:
    """Check bits per head and dim; stops at the first error, however long the lists."""
    if not isinstance(value, (list, tuple)) or not value:
        raise wrong(f"must be one list of bits per KV head, found {show(value)}")
    for head, row in enumerate(value):
        if not isinstance(row, (list, tuple)) or not row:
            raise wrong(f"must be a list of bits for head {head}, found {show(row)}")
        for dim, bits in enumerate(row):
            # The type before the value: True equals 1 and 2.0 equals 2.
            if type(bits) is not int or bits not in CHANNEL_BITS:
                place = f"at head {head} dim {dim}"
                raise wrong(f"must be 0, 2, 4, 8 or 16 {place}, found {show(bits)}")
    return tuple(map(tuple, value))


def _rows_or_bits(value: object) -> int | tuple[tuple[int, ...], ...]:
    if isinstance(value, (list, tuple)):
        return _rows(value)
    if type(value) is not int or value not in TOKEN_BITS:
        raise wrong(f"must be 2, 3, 4, 8, 16 or bits per head and dim, found {show(value)}")
    return value


def exact(value: object) -> object:
    # A literal alone would take 128.0 for 128.
    if isinstance(value, (bool, float)):
        raise wrong(f"must be an integer, found {show(value)}")
    return value


_RowsJson = list[list[Literal[0, 2, 4, 8, 16]]]
Rows = tuple[tuple[int, ...], ...]
KBits = Annotated[Rows, PlainValidator(_rows, json_schema_input_type=_RowsJson)]
VBits = Annotated[
    int | Rows,
    PlainValidator(_rows_or_bits, json_schema_input_type=Literal[2, 3, 4, 8, 16] | _RowsJson),
]
