"""Plain-PyTorch codec of sealed pages: the ground truth for every kernel, and the CPU path.

Shapes: P pages, H KV heads, G query heads a KV head, W tokens a page, D dims, m coefficients.
The byte layout is `fourier_vllm.page`; the derivation of the spectral-domain product is in
docs/how-it-works.md.
"""

from __future__ import annotations

import torch

from fourier_vllm.kernels.basis import dct_basis, rotation
from fourier_vllm.page import CODE_BITS, ChannelPlanes, PageLayout, Plane, TokenPlanes

FP16_MAX = 65504.0


def _read(pages: torch.Tensor, plane: Plane, dtype: torch.dtype) -> torch.Tensor:
    """`[P, *plane.shape]` view (copy where alignment asks) of a plane of `pages [P, bytes]`."""
    raw = pages[:, plane.offset : plane.offset + plane.nbytes].contiguous()
    return raw.view(dtype).view(pages.shape[0], *plane.shape)


def _write(pages: torch.Tensor, plane: Plane, values: torch.Tensor) -> None:
    raw = values.contiguous().view(values.shape[0], -1).view(torch.uint8)
    pages[:, plane.offset : plane.offset + plane.nbytes] = raw


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 codes `[..., n]` of `bits` (1, 2, 4, 8) each into `[..., n*bits/8]`, low bits first."""
    per_byte = 8 // bits
    lanes = codes.unflatten(-1, (-1, per_byte))
    shifts = torch.arange(per_byte, device=codes.device, dtype=torch.uint8) * bits
    return (lanes << shifts).sum(-1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `pack`: uint8 `[..., n*bits/8]` to codes `[..., n]`."""
    if bits == 8:
        return packed
    shifts = torch.arange(8 // bits, device=packed.device, dtype=torch.uint8) * bits
    return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def quantize(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric min/max quantisation of the last dim.

    Returns codes (uint8, shape of `x`) and fp16 scale and zero without the last dim; codes refer to
    the rounded scale and zero, so dequantisation is `codes * scale + zero` exactly.
    """
    levels = (1 << bits) - 1
    zero = x.amin(-1).clamp(-FP16_MAX, FP16_MAX).half()
    span = x.amax(-1) - zero.float()
    scale = (span / levels).clamp(0.0, FP16_MAX).half()
    step = scale.float().clamp_min(torch.finfo(torch.float16).tiny)[..., None]
    codes = ((x - zero.float()[..., None]) / step).round().clamp(0, levels)
    return codes.to(torch.uint8), scale, zero


class ChannelCodec:
    """Spectral coefficients plus per-dim residual codes of one tensor (K, or V in `paper`)."""

    def __init__(
        self, planes: ChannelPlanes, layout: PageLayout, dtype: torch.dtype, device: torch.device
    ):
        self.planes, self.layout, self.dtype = planes, layout, dtype
        self.coef_dtype = torch.int8 if planes.coef_scale is not None else dtype
        W, m = layout.page_size, layout.coefficients
        self.basis = dct_basis(W, m).float().to(device)  # [m, W]
        self.rows = {b: torch.tensor(r, device=device) for b, r in planes.rows.items() if r}
        self.coded = torch.tensor(planes.coded_rows, dtype=torch.long, device=device)

    def seal(self, x: torch.Tensor, pages: torch.Tensor) -> None:
        """Write `x [P, W, H, D]` (float32) into `pages [P, bytes]` (uint8)."""
        P, W, H, D = x.shape
        m = self.layout.coefficients
        y = x.permute(0, 2, 3, 1).reshape(P, H * D, W)
        coef = y @ self.basis.T  # [P, H*D, m]
        if 16 in self.rows:
            coef[:, self.rows[16]] = 0.0
            _write(pages, self.planes.raw, y[:, self.rows[16]].to(self.dtype))
        coef = coef.view(P, H, D, m).transpose(2, 3)  # [P, H, m, D]
        if self.planes.coef_scale is not None:
            scale = (coef.abs().amax(-1) / 127).clamp_max(FP16_MAX).half()
            step = scale.float().clamp_min(torch.finfo(torch.float16).tiny)[..., None]
            stored = (coef / step).round().clamp(-127, 127).to(torch.int8)
            _write(pages, self.planes.coef_scale, scale)
        else:
            stored = coef.to(self.dtype)
        _write(pages, self.planes.coef, stored)
        residual = y - self._coefficients(pages).transpose(2, 3).reshape(P, H * D, m) @ self.basis
        scales, zeros = [], []
        for b in CODE_BITS:
            if b in self.rows:
                codes, scale, zero = quantize(residual[:, self.rows[b]], b)
                _write(pages, self.planes.codes[b], pack(codes, b))
                scales.append(scale)
                zeros.append(zero)
        if scales:
            _write(pages, self.planes.scale, torch.cat(scales, 1))
            _write(pages, self.planes.zero, torch.cat(zeros, 1))

    def _coefficients(self, pages: torch.Tensor) -> torch.Tensor:
        """Dequantised coefficients `[P, H, m, D]`."""
        coef = _read(pages, self.planes.coef, self.coef_dtype).float()
        if self.planes.coef_scale is not None:
            coef = coef * _read(pages, self.planes.coef_scale, torch.float16).float()[..., None]
        return coef

    def _codes(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes `[P, H*D, W]` as floats (raw rows as values), scale and zero `[P, H*D]`."""
        P, rows = pages.shape[0], self.layout.num_kv_heads * self.layout.head_size
        codes = pages.new_zeros((P, rows, self.layout.page_size), dtype=torch.float32)
        scale = pages.new_zeros((P, rows), dtype=torch.float32)
        zero = torch.zeros_like(scale)
        for b in CODE_BITS:
            if b in self.rows:
                packed = _read(pages, self.planes.codes[b], torch.uint8)
                codes[:, self.rows[b]] = unpack(packed, b).float()
        if self.coded.numel():
            scale[:, self.coded] = _read(pages, self.planes.scale, torch.float16).float()
            zero[:, self.coded] = _read(pages, self.planes.zero, torch.float16).float()
        if 16 in self.rows:
            codes[:, self.rows[16]] = _read(pages, self.planes.raw, self.dtype).float()
            scale[:, self.rows[16]] = 1.0
        return codes, scale, zero

    def reconstruct(self, pages: torch.Tensor) -> torch.Tensor:
        """Rebuild the tensor, `[P, W, H, D]` float32, dim by dim as the format defines it."""
        codes, scale, zero = self._codes(pages)
        y = codes * scale[..., None] + zero[..., None]
        y = y + self._coefficients(pages).transpose(2, 3).flatten(1, 2) @ self.basis
        return y.unflatten(1, (self.layout.num_kv_heads, -1)).permute(0, 3, 1, 2)

    def scores(self, q: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """`q [P, H, G, D]` times this tensor, `[P, H, G, W]`, without rebuilding it:
        `codes . (scale * q) + E^T (C q) + (zero . q)`."""
        codes, scale, zero = (
            t.unflatten(1, (self.layout.num_kv_heads, -1)) for t in self._codes(pages)
        )
        s = (q * scale[:, :, None]) @ codes
        s += (q @ self._coefficients(pages).transpose(2, 3)) @ self.basis
        return s + (q * zero[:, :, None]).sum(-1, keepdim=True)

    def combine(self, p: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """Weights `p [P, H, G, W]` times this tensor, `[P, H, G, D]`."""
        codes, scale, zero = (
            t.unflatten(1, (self.layout.num_kv_heads, -1)) for t in self._codes(pages)
        )
        out = (p @ codes.transpose(2, 3)) * scale[:, :, None]
        out += (p @ self.basis.T) @ self._coefficients(pages)
        return out + p.sum(-1, keepdim=True) * zero[:, :, None]

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
            _write(pages, planes.codes, x.to(self.dtype))
            return
        codes, scale, zero = quantize(x @ self.rotation, planes.bits)
        if planes.high is not None:
            _write(pages, planes.codes, pack(codes & 3, 2))
            _write(pages, planes.high, pack(codes >> 2, 1))
        else:
            _write(pages, planes.codes, pack(codes, planes.bits))
        _write(pages, planes.scale, scale)
        _write(pages, planes.zero, zero)

    def _codes(self, pages: torch.Tensor) -> torch.Tensor:
        """Codes `[P, H, W, D]` as floats (16 bits: the values)."""
        planes = self.planes
        if planes.bits == 16:
            return _read(pages, planes.codes, self.dtype).float()
        if planes.high is not None:
            low = unpack(_read(pages, planes.codes, torch.uint8), 2)
            return (low | (unpack(_read(pages, planes.high, torch.uint8), 1) << 2)).float()
        return unpack(_read(pages, planes.codes, torch.uint8), planes.bits).float()

    def reconstruct(self, pages: torch.Tensor) -> torch.Tensor:
        """Rebuild the tensor, `[P, W, H, D]` float32."""
        x = self._codes(pages)
        if self.planes.scale is not None and self.planes.zero is not None:
            scale = _read(pages, self.planes.scale, torch.float16).float()[..., None]
            zero = _read(pages, self.planes.zero, torch.float16).float()[..., None]
            x = (x * scale + zero) @ self.rotation.T
        return x.transpose(1, 2)

    def combine(self, p: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        """Weights `p [P, H, G, W]` times the rotated values, `[P, H, G, D]`; `finish` undoes the
        rotation. Scales are folded into `p`, zeros make a rank-one term."""
        codes = self._codes(pages)
        if self.planes.scale is None or self.planes.zero is None:
            return p @ codes
        scale = _read(pages, self.planes.scale, torch.float16).float()[:, :, None]
        zero = _read(pages, self.planes.zero, torch.float16).float()[..., None]
        return (p * scale) @ codes + p @ zero

    def finish(self, out: torch.Tensor) -> torch.Tensor:
        """Undo the rotation of `out [..., D]`, once an output instead of once a token."""
        return out if self.planes.bits == 16 else out @ self.rotation.T


class PageCodec:
    """Seals, rebuilds and attends pages of one layer.

    Parameters
    ----------
    layout : PageLayout
    dtype : torch.dtype
        Model dtype, of raw planes and 16-bit coefficients.
    """

    def __init__(self, layout: PageLayout, dtype: torch.dtype, device: torch.device | str = "cpu"):
        device = torch.device(device)
        self.layout = layout
        self.k = ChannelCodec(layout.k, layout, dtype, device)
        self.v = (
            TokenCodec(layout.v, layout, dtype, device)
            if isinstance(layout.v, TokenPlanes)
            else ChannelCodec(layout.v, layout, dtype, device)
        )

    def seal(
        self, k: torch.Tensor, v: torch.Tensor, num_pinned: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Seal pages.

        Parameters
        ----------
        k, v : torch.Tensor
            `[P, W, H, D]`, any float dtype, post-RoPE keys.
        num_pinned : torch.Tensor, optional
            `[P]`, leading tokens of each page that attention reads raw (the attention sinks): they
            are replaced by the mean of the others, so that their outsized keys cost no precision.

        Returns
        -------
        torch.Tensor
            `[P, page_bytes]` uint8.
        """
        k, v = k.float(), v.float()
        if num_pinned is not None:
            pinned = torch.arange(k.shape[1], device=k.device)[None] < num_pinned[:, None]
            mask = pinned[:, :, None, None]
            others = (~mask).sum(1, keepdim=True).clamp_min(1)
            k = torch.where(mask, (k * ~mask).sum(1, keepdim=True) / others, k)
            v = torch.where(mask, (v * ~mask).sum(1, keepdim=True) / others, v)
        pages = k.new_zeros((k.shape[0], self.layout.page_bytes), dtype=torch.uint8)
        self.k.seal(k, pages)
        self.v.seal(v, pages)
        return pages

    def reconstruct(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of `pages [P, page_bytes]`, each `[P, W, H, D]` float32."""
        return self.k.reconstruct(pages), self.v.reconstruct(pages)
