"""Signatures, sources and fields of vLLM's code."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap


def parameters(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def source(thing) -> str:
    return textwrap.dedent(inspect.getsource(thing))


def fields(thing) -> set[str]:
    return {field.name for field in dataclasses.fields(thing)}
