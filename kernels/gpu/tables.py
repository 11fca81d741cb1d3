"""What the Triton kernels need to know of a layer's page format, as device tensors and launch arguments."""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import sub

import torch
from torch import Tensor

from fourier_vllm.kernels.basis import dct_basis, fragment_basis, rotation
from fourier_vllm.page import (
    COLUMN_GROUP,
    ChannelPlanes,
    PageLayout,
    TokenPlanes,
    align,
    head_starts,
)

MIN_PAGE_SIZE = 64  # a quarter of a page is a side of a matrix product
MIN_DOT = 16
MIN_ROWS = 8  # columns of the smallest matrix instruction
COLUMNS = 32  # a row of queries by column is a multiple: one compiled kernel for all layers


def next_power_of_2(n: int, least: int = MIN_DOT) -> int:
    """Smallest power of two that is at least `n` and `least`, the side of a matrix product."""
    return max(least, 1 << (n - 1).bit_length())


def num_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU; anything for Triton's interpreter."""
    if device.type != "cuda":
        return MIN_DOT
    return torch.cuda.get_device_properties(device).multi_processor_count


def basis_fragments(W: int, m: int) -> Tensor:
    """Rows of the DCT from the second on, zeros, and ones in the eighth, as pairs of fp16.

    Word `[n, g, t, r]` holds rows 2t and 2t + 1 of token n W/4 + 8r + g.
    """
    rows = torch.zeros(8, W, dtype=torch.float32)
    rows[: max(m - 1, 0)], rows[7] = fragment_basis(W, m), 1.0
    words = rows.half().view(4, 2, 4, W // 32, 8).permute(2, 4, 0, 3, 1)  # n g t r pair
    return words.contiguous().view(torch.int32).flatten()


@dataclass(frozen=True)
class ChannelTables:
    """Index tables of one channel codec.

    Attributes
    ----------
    column_start, raw_start : Tensor [H + 1], int32
        Each head's columns of codes (in fragment order: groups of 4) and raw dims.
    column_dim, raw_dim : Tensor [N], [R], int32
        Dim within its head, -1 in padding.
    column_coded : Tensor [N], int32
        Index of a column's dim among the coded dims, for its scale and zero.
    column_level : Tensor [N], int32
        Place of the column's two bits.
    dims : Tensor [4, H, D], int32
        For sealing: bits of a dim, its index among the coded ones, its first column, its index among
        the raw ones; -1 where it has none.
    offsets : tuple of int
        Bytes from the page's start to coef, coef_scale, raw, codes, scale, zero.
    """

    column_start: Tensor
    column_dim: Tensor
    column_coded: Tensor
    column_level: Tensor
    raw_start: Tensor
    raw_dim: Tensor
    dims: Tensor
    offsets: tuple[int, int, int, int, int, int]
    has_codes: bool
    has_raw: bool
    small_coefficients: bool

    @classmethod
    def build(
        cls, planes: ChannelPlanes, layout: PageLayout, device: torch.device
    ) -> ChannelTables:
        D, H = layout.head_size, layout.num_kv_heads
        columns, places, starts = planes.columns(), planes.places(D), planes.column_starts

        def table(values: list[int]) -> Tensor:
            return torch.tensor(values or [0], dtype=torch.int32, device=device)

        column_dim, column_level = [-1] * starts[-1], [0] * starts[-1]
        for place, (i, level) in zip(places, columns, strict=True):
            column_dim[place], column_level[place] = planes.coded_dims[i] % D, level
        first = [place for place, (_, level) in zip(places, columns, strict=True) if level == 0]
        coded, raw = list(planes.coded_dims), list(planes.raw_dims)
        bits = torch.tensor(planes.coded_bits, dtype=torch.int32)
        by_dim = torch.full((4, H * D), -1, dtype=torch.int32)
        by_dim[0] = 0
        by_dim[0, coded], by_dim[0, raw] = bits, 16
        by_dim[1, coded] = torch.arange(len(coded), dtype=torch.int32)
        by_dim[2, coded] = torch.tensor(first, dtype=torch.int32)
        by_dim[3, raw] = torch.arange(len(raw), dtype=torch.int32)
        scale = planes.coef_scale
        return cls(
            column_start=table([n // COLUMN_GROUP if layout.fragments else n for n in starts]),
            column_dim=table(column_dim),
            column_coded=table([i for i, _ in columns]),
            column_level=table(column_level),
            raw_start=table(head_starts(planes.raw_dims, D, H)),
            raw_dim=table([dim % D for dim in planes.raw_dims]),
            dims=by_dim.view(4, H, D).to(device),
            offsets=(
                planes.coef.offset,
                scale.offset if scale else 0,
                planes.raw.offset,
                planes.codes.offset,
                planes.scale.offset,
                planes.zero.offset,
            ),
            has_codes=bool(columns),
            has_raw=bool(planes.raw_dims),
            small_coefficients=scale is not None,
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return (
            self.column_start,
            self.column_dim,
            self.column_coded,
            self.column_level,
            self.raw_start,
            self.raw_dim,
        )


@dataclass(frozen=True)
class Tables:
    """All of a layer's tables on one device.

    Attributes
    ----------
    k, v : ChannelTables
        With V's token codec `v` is a stand-in.
    v_bits : int
        2, 3, 4, 8 or 16 of the token codec, 0 for the channel codec.
    v_offsets : tuple of int
        Bytes from the page's start to V's coef, coef_scale, raw, codes, scale, zero and high; 0 for
        those that its codec does not have.
    basis : Tensor [MC, W], float32
        DCT-II rows, zero beyond the m coefficients; in fragment order those from the second on, rounded.
    fragment_basis : Tensor [W * 4], int32
        For fragment order, see `basis_fragments`.
    num_columns : int
        Of a row of queries by column: room for the head with the most, in fragment order.
    rotation : Tensor [BD, BD], float32
        Of V's token codec, zero beyond the D dims; the identity where nothing is rotated.
    signs, signs_scale : Tensor [BD, BD], float
        The same as a product; where D is a power of two `signs` is +-1, exact in any precision.
    sign_bits : Tensor [BD, BD], int16
        The sign bits of a 16-bit float of them.
    num_sms : int
        Multiprocessors, for grids that do not follow the work.
    """

    layout: PageLayout
    k: ChannelTables
    v: ChannelTables
    v_bits: int
    v_offsets: tuple[int, ...]
    basis: Tensor
    fragment_basis: Tensor
    num_columns: int
    rotation: Tensor
    signs: Tensor
    sign_bits: Tensor
    signs_scale: float
    num_sms: int

    @property
    def num_rows(self) -> int:
        """Rows of coefficients that a page holds."""
        return self.layout.k.coef.shape[1]

    def by_name(self) -> dict[str, Tensor]:
        """All tables."""
        parts: dict[str, Tables | ChannelTables] = {"": self, "k_": self.k, "v_": self.v}
        found = {
            prefix + x.name: getattr(part, x.name)
            for prefix, part in parts.items()
            for x in fields(part)
        }
        return {name: x for name, x in found.items() if isinstance(x, Tensor)}

    def kinds(self) -> dict[str, bool]:
        """What kernels of K's and V's codecs compile for."""
        k, v = self.k, self.v
        return dict(
            K_SMALL=k.small_coefficients, K_CODES=k.has_codes, K_RAW=k.has_raw,
            V_SMALL=v.small_coefficients, V_CODES=v.has_codes, V_RAW=v.has_raw,
        )  # fmt: skip

    @classmethod
    def build(cls, layout: PageLayout, device: torch.device | str) -> Tables:
        """
        Raises
        ------
        ValueError
            Pages are too small for these kernels.
        """
        device = torch.device(device)
        W, D, m = layout.page_size, layout.head_size, layout.coefficients
        if W < MIN_PAGE_SIZE:
            raise ValueError(
                f"page_size must be at least {MIN_PAGE_SIZE} on a GPU, found {W}: use a recipe with"
                " larger pages."
            )
        k, starts = ChannelTables.build(layout.k, layout, device), layout.k.column_starts
        basis = torch.zeros(next_power_of_2(m), W, dtype=torch.float32)
        if layout.fragments:
            basis[: max(m - 1, 0)] = fragment_basis(W, m)
        else:
            basis[:m] = dct_basis(W, m)
        turn = torch.zeros(next_power_of_2(D), next_power_of_2(D), dtype=torch.float32)
        if isinstance(layout.v, TokenPlanes):
            bits, v = layout.v.bits, k
            planes = (layout.v.codes, layout.v.scale, layout.v.zero, layout.v.high)
            offsets = (0, 0, 0, *(plane.offset if plane else 0 for plane in planes))
        else:
            bits, v = 0, ChannelTables.build(layout.v, layout, device)
            offsets = (*v.offsets, 0)
        turn[:D, :D] = rotation(D) if 0 < bits < 16 else torch.eye(D)
        signs_scale = (D & -D) ** -0.5
        columns = max(1, *map(sub, starts[1:], starts))
        return cls(
            layout=layout,
            k=k,
            v=v,
            v_bits=bits,
            v_offsets=offsets,
            basis=basis.to(device),
            fragment_basis=basis_fragments(W, m if layout.fragments else 1).to(device),
            num_columns=align(columns, COLUMNS) if layout.fragments else 0,
            rotation=turn.to(device),
            signs=(turn / signs_scale).to(device),
            sign_bits=(turn.sign() < 0).short().mul(-0x8000).to(device),
            signs_scale=signs_scale,
            num_sms=num_sms(device),
        )
