"""Codec of pages in fragment order (`page.py`), by reading and writing the planes of the plain one."""

from __future__ import annotations

import torch

from fourier_vllm.kernels.basis import fragment_basis
from fourier_vllm.kernels.ranges import FP16_MAX
from fourier_vllm.kernels.reference.codecs import (
    ChannelCodec,
    TokenCodec,
    pack,
    quantize,
    quantize_coefficients,
    read_plane,
    unpack,
)
from fourier_vllm.page import COLUMN_GROUP, ChannelPlanes, PageLayout, TokenPlanes, run_of

BIAS = 128  # of a coefficient: unsigned bytes need no sign


def swap(x: torch.Tensor) -> torch.Tensor:
    """Numbers 0, 1, 2, 3 of every four along the last dim as 0, 2, 1, 3: a word's even bytes become one
    pair of operands, its odd bytes the next."""
    return x.unflatten(-1, (-1, 2, 2)).transpose(-1, -2).flatten(-3)


def columns_to_fragments(x: torch.Tensor) -> torch.Tensor:
    """Bytes of columns `[P, N, W/4]`, N a multiple of 4, in fragment order, same shape."""
    P, N, n = x.shape
    words = x.view(P, N // COLUMN_GROUP, COLUMN_GROUP, n // 8, 8)  # i c r g
    return swap(words.permute(0, 1, 4, 3, 2)).reshape(P, N, n)


def columns_from_fragments(x: torch.Tensor) -> torch.Tensor:
    """Inverse of `columns_to_fragments`."""
    P, N, n = x.shape
    words = swap(x.view(P, N // COLUMN_GROUP, 8, n // 8, COLUMN_GROUP))  # i g r c
    return words.permute(0, 1, 4, 3, 2).reshape(P, N, n)


def rows_to_fragments(x: torch.Tensor) -> torch.Tensor:
    """Bytes `[..., W/4, 8n]` of dims as rows, in fragment order `[..., W/64, n/E, 4, 8, E, 4]`."""
    run = run_of(x.shape[-1] // 8)
    x = x.unflatten(-1, (-1, run, 8)).unflatten(-4, (-1, 4, 4))  # k t c i r g
    order = (-6, -3, -5, -1, -2, -4)
    return swap(x.permute(*range(x.dim() - 6), *(x.dim() + i for i in order)))


def rows_from_fragments(x: torch.Tensor) -> torch.Tensor:
    """Inverse of `rows_to_fragments`, `[..., W/4, 8n]`."""
    x = swap(x)  # k i t g r c
    order = (-6, -4, -1, -5, -2, -3)
    x = x.permute(*range(x.dim() - 6), *(x.dim() + i for i in order))
    return x.flatten(-3).flatten(-4, -2)


class FragmentChannelCodec(ChannelCodec):
    """K: the page's means and the zeros of residuals are one plane, read as a first coefficient."""

    def __init__(
        self, planes: ChannelPlanes, layout: PageLayout, dtype: torch.dtype, device: torch.device
    ):
        super().__init__(planes, layout, dtype, device)
        W, m = layout.page_size, layout.coefficients
        # What the tensor cores multiply with: its rounding is part of the format.
        rows = fragment_basis(W, m).float()
        self.basis = torch.cat([torch.ones(1, W, dtype=torch.float32), rows]).to(device)
        self.places = torch.tensor(
            planes.places(layout.head_size), dtype=torch.long, device=device
        )  # [N]
        self.max_scale = FP16_MAX / (
            4.0 ** (self.bits // 2 - 1)
        )  # [C], its last column's is finite

    def seal(self, x: torch.Tensor, pages: torch.Tensor) -> None:
        P, W, H, D = x.shape
        planes = self.planes
        y = x.permute(0, 2, 3, 1).reshape(P, H * D, W)
        assert planes.coef_scale is not None
        coef = (y @ self.basis[1:].T).view(P, H, D, -1).transpose(2, 3)  # [P, H, m - 1, D]
        coef, scale = quantize_coefficients(coef)
        read_plane(pages, planes.coef_scale, torch.float16)[:] = scale
        read_plane(pages, planes.coef, torch.uint8)[:] = swap((coef + BIAS).byte())
        low = (coef * scale.float()[..., None]).transpose(2, 3).reshape(P, H * D, -1)
        rest = y - low @ self.basis[1:]
        zero = rest.mean(-1) if self.layout.coefficients else torch.zeros_like(rest[..., 0])
        codes, scale, low = quantize(rest[:, self.coded], self.bits, max_scale=self.max_scale)
        zero[:, self.coded] = low.float()
        zeros = zero.clamp(-FP16_MAX, FP16_MAX).view(P, H, D)
        read_plane(pages, planes.zero, torch.float16)[:] = zeros.half()
        weight = scale[:, self.column_coded].float() * self.column_weight
        read_plane(pages, planes.scale, torch.float16)[:, self.places] = weight.half()
        columns = codes[:, self.column_coded] >> (2 * self.column_level).byte()[:, None]
        padded = codes.new_zeros(P, *planes.codes.shape)
        padded[:, self.places] = pack(columns & 3, 2, dim=-1)
        read_plane(pages, planes.codes, torch.uint8)[:] = columns_to_fragments(padded)

    def _coefficients(self, pages: torch.Tensor) -> torch.Tensor:
        planes = self.planes
        assert planes.coef_scale is not None
        coef = swap(read_plane(pages, planes.coef, torch.uint8)).float() - BIAS
        coef *= read_plane(pages, planes.coef_scale, torch.float16).float()[..., None]
        zero = read_plane(pages, planes.zero, torch.float16).float()
        return torch.cat([zero[:, :, None], coef], 2)

    def _scale_and_zero(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weight = read_plane(pages, self.planes.scale, torch.float16).float()
        scale = weight[:, self.places[self.column_level == 0]][:, None]
        return scale, torch.zeros_like(scale)

    def _columns(self, pages: torch.Tensor) -> torch.Tensor:
        packed = columns_from_fragments(read_plane(pages, self.planes.codes, torch.uint8))
        return unpack(packed[:, self.places], 2, dim=-1)


class FragmentTokenCodec(TokenCodec):
    """V below 16 bits."""

    def __init__(
        self, planes: TokenPlanes, layout: PageLayout, dtype: torch.dtype, device: torch.device
    ):
        super().__init__(planes, layout, dtype, device)
        self.shape = (layout.num_kv_heads, 8, 4, layout.page_size // 32)  # of scales: H g n r

    def seal(self, x: torch.Tensor, pages: torch.Tensor) -> None:
        planes = self.planes
        assert planes.scale is not None
        assert planes.zero is not None
        codes, scale, zero = self._quantize(x.transpose(1, 2))  # [P, H, W, D]
        rows = read_plane(pages, planes.codes, torch.uint8)
        for level in range(planes.bits // 2):
            packed = rows_to_fragments(pack((codes >> (2 * level)) & 3, 2))
            rows[:, level] = packed.view(rows[:, level].shape)
        if planes.high is not None:
            high = read_plane(pages, planes.high, torch.uint8)
            bits = pack(codes >> 2, 2).unflatten(-1, (-1, 2, 8))  # [P, H, W/4, D/16, 2, 8]
            both = (bits[..., 0, :] | (bits[..., 1, :] << 1)).flatten(-2)
            high[:] = rows_to_fragments(both).view(high.shape)
        for plane, value in ((planes.scale, scale), (planes.zero, zero)):
            value = value.unflatten(-1, (4, -1, 8)).permute(0, 1, 4, 2, 3)
            read_plane(pages, plane, torch.float16)[:] = value.reshape(value.shape[0], *plane.shape)

    def _codes(self, pages: torch.Tensor) -> torch.Tensor:
        planes, D = self.planes, self.layout.head_size
        rows = read_plane(pages, planes.codes, torch.uint8)  # [P, b/2, H, W/4, D]
        packed = rows_from_fragments(self._fragments(rows, D // 8))
        levels = unpack(packed, 2)
        codes = sum(levels[:, level] * 4.0**level for level in range(planes.bits // 2))
        if planes.high is not None:
            both = read_plane(pages, planes.high, torch.uint8)  # [P, H, W/8, D]
            both = rows_from_fragments(self._fragments(both, D // 16)).unflatten(-1, (-1, 8))
            bits = torch.stack([both & 0x55, (both >> 1) & 0x55], -2)  # [P, H, W/4, D/16, 2, 8]
            codes = codes + 4.0 * unpack(bits.flatten(-3), 2)
        assert isinstance(codes, torch.Tensor)
        return codes

    def _fragments(self, x: torch.Tensor, n: int) -> torch.Tensor:
        run = run_of(n)
        return x.flatten(-2).unflatten(-1, (-1, n // run, 4, 8, run, 4))

    def _scale_and_zero(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        planes = self.planes
        assert planes.scale is not None
        assert planes.zero is not None
        both = (read_plane(pages, plane, torch.float16) for plane in (planes.scale, planes.zero))
        # [P, H, W]
        scale, zero = (
            x.unflatten(-1, self.shape[1:]).permute(0, 1, 3, 4, 2).flatten(2) for x in both
        )
        return scale.float(), zero.float()
