"""Reading 16-bit and 32-bit floats out of a cache's bytes, in code compiled by numba."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import njit

FLOAT32, FLOAT16, BFLOAT16 = range(3)
KINDS = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}
jit = njit(cache=True, nogil=True, fastmath={"nsz", "arcp", "contract", "afn", "reassoc"})


class Row(NamedTuple):
    """Scratch for one row of numbers: the same memory as bits and as float32."""

    bits: np.ndarray
    values: np.ndarray


class Views(NamedTuple):
    """One cache, flat, as numbers of each width over the same memory; `stride` bytes a block."""

    u8: np.ndarray
    u16: np.ndarray
    f32: np.ndarray
    stride: int


def views_of(cache: torch.Tensor) -> Views:
    """`cache [blocks, bytes]` uint8, blocks any multiple of 4 bytes apart."""
    stride = cache.stride(0)
    flat = cache.as_strided(((len(cache) - 1) * stride + cache.shape[1],), (1,))
    return Views(
        flat.numpy(),
        flat.view(torch.int16).numpy().view(np.uint16),
        flat.view(torch.float32).numpy(),
        stride,
    )


@jit
def new_row(size: int) -> Row:
    bits = np.empty(size, np.uint32)
    return Row(bits, bits.view(np.float32))


@jit
def load_halves(source: np.ndarray, start: int, count: int, kind: int, row: Row) -> None:
    """Widen `count` 16-bit floats; fp16 through the exponent bias, so that subnormals work too."""
    halves, bits, values = source[start : start + count], row.bits, row.values
    if kind == BFLOAT16:
        for i in range(count):
            bits[i] = np.uint32(halves[i]) << np.uint32(16)
    else:
        for i in range(count):
            h = np.uint32(halves[i])
            bits[i] = ((h & np.uint32(0x8000)) << np.uint32(16)) | (
                (h & np.uint32(0x7FFF)) << np.uint32(13)
            )
        for i in range(count):
            values[i] *= np.float32(2.0**112)


@jit
def load(views: Views, start: int, count: int, kind: int, row: Row) -> None:
    """`count` floats of `kind` from byte `start` of the cache."""
    if kind == FLOAT32:
        row.values[:count] = views.f32[start // 4 : start // 4 + count]
    else:
        load_halves(views.u16, start // 2, count, kind, row)
