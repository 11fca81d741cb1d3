"""Plain-PyTorch codecs of one tensor of a sealed page: the ground truth for every kernel, and the CPU path.

Shapes: P pages, H KV heads, G query heads a KV head, W tokens a page, D dims, m coefficients, C coded
dims, R raw dims, N columns of 2-bit codes. The byte layout is `fourier_vllm.page`; the derivation of the
spectral-domain product is in docs/understand/how-it-works.md.
"""

from __future__ import annotations

import torch

from fourier_vllm.kernels.basis import dct_basis, rotation
from fourier_vllm.kernels.ranges import FP16_MAX, range_share
from fourier_vllm.page import ChannelPlanes, PageLayout, Plane, TokenPlanes


def read_plane(pages: torch.Tensor, plane: Plane, dtype: torch.dtype) -> torch.Tensor:
    """View of a plane of `pages [P, bytes]`, `[P, *plane.shape]` of `dtype`."""
    start, size = plane.offset // dtype.itemsize, plane.nbytes // dtype.itemsize
    return pages.view(dtype)[:, start : start + size].view(pages.shape[0], *plane.shape)


def pack(codes: torch.Tensor, bits: int, dim: int = -2) -> torch.Tensor:
    """Pack uint8 codes of 1 or 2 bits along their n tokens at `dim` (-1 or -2), n * bits / 8 bytes.

    Of s = n * bits / 8 bytes, byte j holds the codes of tokens j, j + s, j + 2s, ..., lowest bits first.
    """
    runs = codes.unflatten(dim, (8 // bits, -1))
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (runs << shifts.view(-1, *[1] * -dim)).sum(dim - 1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, bits: int, dim: int = -2) -> torch.Tensor:
    """Inverse of `pack`, as floats."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    runs = packed.unsqueeze(dim - 1) >> shifts.view(-1, *[1] * -dim)
    runs &= (1 << bits) - 1
    return runs.flatten(dim - 1, dim).float()


def step_of(scale: torch.Tensor) -> torch.Tensor:
    """Divisor `[..., 1]` for an fp16 scale `[...]`, which may be zero."""
    step = scale.float()
    return torch.where(step > 0, step, 1.0)[..., None]


def quantize(
    x: torch.Tensor,
    bits: int | torch.Tensor,
    share: float = 1.0,
    max_scale: float | torch.Tensor = FP16_MAX,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric min/max quantisation of the last dim.

    Parameters
    ----------
    x : torch.Tensor
        `[..., n]` float32.
    bits : int or torch.Tensor
        Bits of all of `x`, or `[...]` of each run.
    share : float
        Share of the range of `x`, about its middle, that the codes span.
    max_scale : float or torch.Tensor
        Largest scale, of all of `x` or `[...]`.

    Returns
    -------
    tuple of torch.Tensor
        Codes (uint8, shape of `x`), fp16 scale and zero `[...]`. Codes refer to the rounded scale and
        zero, so that dequantisation is `codes * scale + zero` exactly.
    """
    levels = torch.as_tensor(2**bits - 1, dtype=torch.float32, device=x.device)
    low, high = x.amin(-1), x.amax(-1)
    cut = (high - low) * ((1.0 - share) / 2)
    zero = (low + cut).clamp(-FP16_MAX, FP16_MAX).half()
    scale = (high - cut - zero.float()) / levels
    scale = scale.clamp_min(0.0).minimum(torch.as_tensor(max_scale, device=x.device)).half()
    codes = ((x - zero.float()[..., None]) / step_of(scale)).round()
    codes = torch.minimum(codes.clamp_min(0.0), levels[..., None])
    return codes.byte(), scale, zero


def quantize_coefficients(coef: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of coefficients `[..., D]` as whole numbers of 8 bits, and their fp16 scales `[...]`."""
    scale = (coef.abs().amax(-1) / 127).clamp_max(FP16_MAX).half()
    return (coef / step_of(scale)).round().clamp(-127, 127), scale


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Inverse of `quantize` to its rounding, float32."""
    return codes * scale.float()[..., None] + zero.float()[..., None]


class ChannelCodec:
    """Spectral coefficients plus per-dim residual codes of one tensor (K, or V in `paper`)."""

    def __init__(
        self, planes: ChannelPlanes, layout: PageLayout, dtype: torch.dtype, device: torch.device
    ):
        def index(values: list[int] | tuple[int, ...]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        self.planes, self.layout, self.dtype = planes, layout, dtype
        self.coef_dtype = torch.int8 if planes.coef_scale is not None else dtype
        self.basis = dct_basis(layout.page_size, layout.coefficients).float().to(device)  # [m, W]
        self.coded, self.raw = index(planes.coded_dims), index(planes.raw_dims)  # [C], [R]
        self.bits = index(planes.coded_bits)  # [C]
        self.column_coded = index([i for i, _ in planes.columns()])  # [N]
        self.column_level = index([level for _, level in planes.columns()])  # [N]
        self.column_weight = 4.0**self.column_level  # [N]
        # Dim within its head, and a mask of the head it belongs to, for each coded dim, column, raw dim.
        self.coded_dim, self.owns_coded = self._places(self.coded)  # [C], [H, 1, C]
        self.column_dim, self.owns_column = self._places(self.coded[self.column_coded])
        self.raw_dim, self.owns_raw = self._places(self.raw)

    def _places(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heads = torch.arange(self.layout.num_kv_heads, device=flat.device)[:, None, None]
        D = self.layout.head_size
        return flat % D, (flat // D == heads).float()

    def seal(self, x: torch.Tensor, pages: torch.Tensor) -> None:
        """Write `x [P, W, H, D]` (float32) into `pages [P, bytes]` (uint8)."""
        P, W, H, D = x.shape
        planes, m = self.planes, self.layout.coefficients
        y = x.permute(0, 2, 3, 1).reshape(P, H * D, W)
        read_plane(pages, planes.raw, self.dtype)[:] = y[:, self.raw]
        coef = y @ self.basis.T  # [P, H*D, m]
        coef[:, self.raw] = 0.0
        coef = coef.view(P, H, D, m).transpose(2, 3)  # [P, H, m, D]
        if planes.coef_scale is not None:
            coef, scale = quantize_coefficients(coef)
            read_plane(pages, planes.coef_scale, torch.float16)[:] = scale
        else:  # the first coefficient is up to sqrt(W) times the largest value
            limit = torch.finfo(self.dtype).max
            coef = coef.clamp(-limit, limit)
        read_plane(pages, planes.coef, self.coef_dtype)[:] = coef
        low = self._coefficients(pages).transpose(2, 3).reshape(P, H * D, m) @ self.basis
        codes, scale, zero = quantize((y - low)[:, self.coded], self.bits)
        columns = (
            codes[:, self.column_coded] >> (2 * self.column_level).byte()[:, None]
        )  # [P, N, W]
        read_plane(pages, planes.codes, torch.uint8)[:] = pack(columns & 3, 2, dim=-1)
        read_plane(pages, planes.scale, torch.float16)[:] = scale
        read_plane(pages, planes.zero, torch.float16)[:] = zero

    def _coefficients(self, pages: torch.Tensor) -> torch.Tensor:
        """Dequantised coefficients `[P, H, m, D]`."""
        coef = read_plane(pages, self.planes.coef, self.coef_dtype).float()
        if self.planes.coef_scale is not None:
            coef *= read_plane(pages, self.planes.coef_scale, torch.float16).float()[..., None]
        return coef

    def _scale_and_zero(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of the coded dims, `[P, 1, C]` each."""
        planes = self.planes
        scale = read_plane(pages, planes.scale, torch.float16).float()
        return scale[:, None], read_plane(pages, planes.zero, torch.float16).float()[:, None]

    def _columns(self, pages: torch.Tensor) -> torch.Tensor:
        """Columns of codes `[P, N, W]` as floats."""
        return unpack(read_plane(pages, self.planes.codes, torch.uint8), 2, dim=-1)

    def reconstruct(self, pages: torch.Tensor) -> torch.Tensor:
        """Rebuild the tensor, `[P, W, H, D]` float32, dim by dim as the format defines it."""
        P, W = pages.shape[0], self.layout.page_size
        y = self._coefficients(pages).transpose(2, 3).flatten(1, 2) @ self.basis  # [P, H*D, W]
        scale, zero = self._scale_and_zero(pages)
        residual = y.new_zeros(P, len(self.coded), W)
        weighted = self._columns(pages) * self.column_weight[:, None]
        residual.index_add_(1, self.column_coded, weighted)
        y[:, self.coded] += residual * scale.transpose(1, 2) + zero.transpose(1, 2)
        y[:, self.raw] = read_plane(pages, self.planes.raw, self.dtype).float()
        return y.unflatten(1, (self.layout.num_kv_heads, -1)).permute(0, 3, 1, 2)

    def scores(self, q: torch.Tensor, page_row: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """Scores of pages against their request's queries, without rebuilding the keys:
        `codes . (scale * q) + E^T (C q) + (zero . q)`.

        Parameters
        ----------
        q : torch.Tensor
            `[B, H, G, D]` float32.
        page_row : torch.Tensor
            `[P]`, which of the B a page belongs to.

        Returns
        -------
        torch.Tensor
            `[P, H, G, W]`.
        """

        def of_pages(x: torch.Tensor) -> torch.Tensor:
            return x if len(q) == 1 else x[page_row]  # one request: broadcast over its pages

        scale, zero = self._scale_and_zero(pages)
        q_columns = (q[..., self.column_dim] * self.owns_column).flatten(1, 2)  # [B, H*G, N]
        weight = scale[..., self.column_coded] * self.column_weight  # [P, 1, N]
        s = (of_pages(q_columns) * weight) @ self._columns(pages)  # [P, H*G, W]
        q_coded = (q[..., self.coded_dim] * self.owns_coded).flatten(1, 2)  # [B, H*G, C]
        s += of_pages(q_coded) @ zero.transpose(1, 2)
        if len(self.raw):
            q_raw = (q[..., self.raw_dim] * self.owns_raw).flatten(1, 2)
            s += of_pages(q_raw) @ read_plane(pages, self.planes.raw, self.dtype).float()
        s = s.unflatten(1, q.shape[1:3])
        s += (of_pages(q) @ self._coefficients(pages).transpose(2, 3)) @ self.basis
        return s

    def combine(self, p: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """Weights `p [P, H, G, W]` times this tensor, `[P, H, G, D]`."""
        H, G = p.shape[1:3]
        flat = p.flatten(1, 2)  # [P, H*G, W]
        scale, zero = self._scale_and_zero(pages)
        sums = flat @ self._columns(pages).transpose(1, 2) * self.column_weight  # [P, H*G, N]
        coded = sums.new_zeros(*sums.shape[:2], len(self.coded))
        coded.index_add_(2, self.column_coded, sums)
        coded = coded * scale + flat.sum(-1)[..., None] * zero
        out = (p @ self.basis.T) @ self._coefficients(pages)
        out.index_add_(-1, self.coded_dim, coded.unflatten(1, (H, G)) * self.owns_coded)
        raw = flat @ read_plane(pages, self.planes.raw, self.dtype).float().transpose(1, 2)
        out.index_add_(-1, self.raw_dim, raw.unflatten(1, (H, G)) * self.owns_raw)
        return out

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """Nothing was rotated."""
        return out


class TokenCodec:
    """Rotated values, quantised per token and head."""

    def __init__(
        self, planes: TokenPlanes, layout: PageLayout, dtype: torch.dtype, device: torch.device
    ):
        self.planes, self.layout, self.dtype = planes, layout, dtype
        self.rotation = rotation(layout.head_size).float().to(device)  # [D, D]

    def seal(self, x: torch.Tensor, pages: torch.Tensor) -> None:
        """Write `x [P, W, H, D]` (float32) into `pages [P, bytes]` (uint8)."""
        x = x.transpose(1, 2)  # [P, H, W, D]
        planes = self.planes
        if planes.scale is None or planes.zero is None:
            read_plane(pages, planes.codes, self.dtype)[:] = x
            return
        codes, scale, zero = self._quantize(x)
        rows = read_plane(pages, planes.codes, torch.uint8)
        for level in range(planes.bits // 2):
            rows[:, level] = pack((codes >> (2 * level)) & 3, 2)
        if planes.high is not None:
            read_plane(pages, planes.high, torch.uint8)[:] = pack(codes >> 2, 1)
        read_plane(pages, planes.scale, torch.float16)[:] = scale
        read_plane(pages, planes.zero, torch.float16)[:] = zero

    def _quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, scales and zeros of `x [P, H, W, D]`, rotated."""
        bits = self.planes.bits
        return quantize(x @ self.rotation, bits, range_share(bits))

    def _scale_and_zero(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of every token, `[P, H, W]` each."""
        planes = self.planes
        assert planes.scale is not None
        assert planes.zero is not None
        scale = read_plane(pages, planes.scale, torch.float16).float()
        return scale, read_plane(pages, planes.zero, torch.float16).float()

    def _codes(self, pages: torch.Tensor) -> torch.Tensor:
        """Codes `[P, H, W, D]` as floats (16 bits: the values)."""
        planes = self.planes
        if planes.bits == 16:
            return read_plane(pages, planes.codes, self.dtype).float()
        rows = unpack(read_plane(pages, planes.codes, torch.uint8), 2)  # [P, b/2, H, W, D]
        codes = rows[:, 0]
        for level in range(1, planes.bits // 2):
            codes = codes + rows[:, level] * 4.0**level
        if planes.high is not None:
            high = unpack(read_plane(pages, planes.high, torch.uint8), 1)
            codes = codes + 4.0 * high
        return codes

    def reconstruct(self, pages: torch.Tensor) -> torch.Tensor:
        """Rebuild the tensor, `[P, W, H, D]` float32."""
        x = self._codes(pages)
        if self.planes.bits < 16:
            scale, zero = self._scale_and_zero(pages)
            x = (x * scale[..., None] + zero[..., None]) @ self.rotation.T
        return x.transpose(1, 2)

    def combine(self, p: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """Weights `p [P, H, G, W]` times the rotated values, `[P, H, G, D]`; `finish` undoes the
        rotation. Scales are folded into `p`, zeros make a rank-one term."""
        if self.planes.bits == 16:
            return p @ self._codes(pages)
        scale, zero = self._scale_and_zero(pages)
        return (p * scale[:, :, None]) @ self._codes(pages) + p @ zero[..., None]

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """Undo the rotation of `out [..., D]`, once an output instead of once a token."""
        return out if self.planes.bits == 16 else out @ self.rotation.T
