"""A layout as the plain numbers and arrays that compiled code takes."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from fourier_vllm.kernels.basis import dct_basis
from fourier_vllm.kernels.reference.codec import PageCodec
from fourier_vllm.page import ChannelPlanes, PageLayout, TokenPlanes, head_starts

FLOAT32, FLOAT16, BFLOAT16 = range(3)
KINDS = {torch.float32: FLOAT32, torch.float16: FLOAT16, torch.bfloat16: BFLOAT16}


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


class Channel(NamedTuple):
    """A channel codec's planes as numbers; offsets in bytes, -1 where there is no plane."""

    coef: int
    coef_scale: int
    raw: int
    codes: int
    scale: int
    zero: int
    column_start: np.ndarray  # [H + 1], a head's columns
    coded_start: np.ndarray  # [H + 1], a head's coded dims
    raw_start: np.ndarray  # [H + 1], a head's raw dims
    column_coded: np.ndarray  # [N]
    column_weight: np.ndarray  # [N] float32
    coded_dim: np.ndarray  # [C], within its head
    raw_dim: np.ndarray  # [R], within its head
    basis: np.ndarray  # [m, W] float32


class Token(NamedTuple):
    """A token codec's planes as numbers."""

    bits: int
    codes: int
    high: int
    scale: int
    zero: int


Numbers = tuple[Channel, Channel, Token]
_made: WeakKeyDictionary[PageCodec, Numbers] = WeakKeyDictionary()  # a step asks once a layer


def numbers(codec: PageCodec) -> Numbers:
    """K's planes and V's; one of the two for V is a stand-in."""
    found = _made.get(codec)
    if found is None:
        found = _made[codec] = _numbers(codec.layout)
    return found


def _numbers(layout: PageLayout) -> Numbers:
    k = _channel(layout.k, layout)
    if isinstance(layout.v, TokenPlanes):
        return k, k, _token(layout.v)
    return k, _channel(layout.v, layout), Token(0, -1, -1, -1, -1)


def _channel(planes: ChannelPlanes, layout: PageLayout) -> Channel:
    H, D = layout.num_kv_heads, layout.head_size
    columns = planes.columns()
    coded = np.array(planes.coded_dims, np.int64)
    raw = np.array(planes.raw_dims, np.int64)
    column_coded = np.array([i for i, _ in columns], np.int64)

    def starts(dims: np.ndarray) -> np.ndarray:
        return np.array(head_starts(dims.tolist(), D, H), np.int64)

    return Channel(
        coef=planes.coef.offset,
        coef_scale=-1 if planes.coef_scale is None else planes.coef_scale.offset,
        raw=planes.raw.offset,
        codes=planes.codes.offset,
        scale=planes.scale.offset,
        zero=planes.zero.offset,
        column_start=starts(coded[column_coded]),
        coded_start=starts(coded),
        raw_start=starts(raw),
        column_coded=column_coded,
        column_weight=np.array([4.0**level for _, level in columns], np.float32),
        coded_dim=coded % D,
        raw_dim=raw % D,
        basis=dct_basis(layout.page_size, layout.coefficients).float().numpy(),
    )


def _token(planes: TokenPlanes) -> Token:
    def offset(plane: Any) -> int:
        return -1 if plane is None else plane.offset

    return Token(
        planes.bits,
        planes.codes.offset,
        offset(planes.high),
        offset(planes.scale),
        offset(planes.zero),
    )


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
