"""Byte layout of one sealed page: every offset the codec and the kernels use is decided here.

A page holds `page_size` (W) tokens of one attention layer for all KV heads of one rank (H heads of
size D). Planes lie one after the other, each 16-byte aligned, the page a multiple of 256 bytes:

```
channel codec (K always; V in the `paper` recipe), rows are (head, dim) pairs
    coef        [H, m, D]      int8, or model dtype       spectral coefficients, DCT-II over W tokens
    coef_scale  [H, m]         fp16                       only with 8-bit coefficients
    raw         [R16, W]       model dtype                dims kept as they are
    codes8/4/2  [Rb, W*b/8]    uint8, low bits first      residual codes, dims sorted by head, then dim
    scale, zero [R8+R4+R2]     fp16                       per dim, in the order of the code planes
token codec (V otherwise), after an orthonormal rotation of the head's D dims when b < 16
    codes       [H, W, D*b/8]  uint8 (3 bits: a 2-bit plane, then a 1-bit plane), or model dtype
    scale, zero [H, W]         fp16                       per token
```

Worked example: one head of size 8, W = 32, m = 1 coefficient of 8 bits, V at 2 bits.

>>> layout = PageLayout.build([[8, 4, 2, 2, 0, 0, 0, 0]], 2, head_size=8, page_size=32,
...                           coefficients=1, coefficient_bits=8, itemsize=2)
>>> [(p.name, p.offset, p.nbytes) for p in layout.planes()]   # doctest: +NORMALIZE_WHITESPACE
[('k.coef', 0, 8), ('k.coef_scale', 16, 2), ('k.codes8', 32, 32), ('k.codes4', 64, 16),
 ('k.codes2', 80, 16), ('k.scale', 96, 8), ('k.zero', 112, 8),
 ('v.codes', 128, 64), ('v.scale', 192, 64), ('v.zero', 256, 64)]
>>> layout.page_bytes, layout.raw_bytes
(512, 1024)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

PLANE_ALIGNMENT = 16
PAGE_ALIGNMENT = 256
CODE_BITS = (8, 4, 2)

Bits = Sequence[Sequence[int]]


def align(n: int, to: int) -> int:
    """Round `n` up to a multiple of `to`."""
    return -(-n // to) * to


@dataclass(frozen=True)
class Plane:
    """A run of bytes inside the page: `shape` elements of `itemsize` bytes at `offset`."""

    name: str
    offset: int
    shape: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        n = self.itemsize
        for extent in self.shape:
            n *= extent
        return n


class _Packer:
    """Hands out consecutive, aligned planes."""

    def __init__(self) -> None:
        self.end = 0

    def take(self, name: str, shape: tuple[int, ...], itemsize: int) -> Plane:
        plane = Plane(name, align(self.end, PLANE_ALIGNMENT), shape, itemsize)
        self.end = plane.offset + plane.nbytes
        return plane


@dataclass(frozen=True)
class ChannelPlanes:
    """Planes of the channel codec; `rows[b]` lists the `head * D + dim` stored at `b` bits."""

    rows: dict[int, tuple[int, ...]]
    coef: Plane
    coef_scale: Plane | None
    raw: Plane
    codes: dict[int, Plane]
    scale: Plane
    zero: Plane

    @property
    def coded_rows(self) -> tuple[int, ...]:
        """Rows with residual codes, in the order of `scale` and `zero`."""
        return sum((self.rows[b] for b in CODE_BITS), ())

    @classmethod
    def pack(
        cls, packer: _Packer, name: str, bits: Bits, W: int, m: int, coef_bits: int, itemsize: int
    ) -> ChannelPlanes:
        H, D = len(bits), len(bits[0])
        flat = [b for head in bits for b in head]
        rows = {b: tuple(i for i, x in enumerate(flat) if x == b) for b in (16, *CODE_BITS)}
        coded = sum(len(rows[b]) for b in CODE_BITS)
        return cls(
            rows=rows,
            coef=packer.take(f"{name}.coef", (H, m, D), 1 if coef_bits == 8 else itemsize),
            coef_scale=packer.take(f"{name}.coef_scale", (H, m), 2) if coef_bits == 8 else None,
            raw=packer.take(f"{name}.raw", (len(rows[16]), W), itemsize),
            codes={
                b: packer.take(f"{name}.codes{b}", (len(rows[b]), W * b // 8), 1) for b in CODE_BITS
            },
            scale=packer.take(f"{name}.scale", (coded,), 2),
            zero=packer.take(f"{name}.zero", (coded,), 2),
        )

    def planes(self) -> Iterator[Plane]:
        yield self.coef
        if self.coef_scale is not None:
            yield self.coef_scale
        yield self.raw
        yield from self.codes.values()
        yield self.scale
        yield self.zero


@dataclass(frozen=True)
class TokenPlanes:
    """Planes of the token codec: `bits` a value, one scale and zero per token and head."""

    bits: int
    codes: Plane
    high: Plane | None
    scale: Plane | None
    zero: Plane | None

    @classmethod
    def pack(
        cls, packer: _Packer, name: str, bits: int, H: int, W: int, D: int, itemsize: int
    ) -> TokenPlanes:
        if bits == 16:
            return cls(16, packer.take(f"{name}.codes", (H, W, D), itemsize), None, None, None)
        low = 2 if bits == 3 else bits
        return cls(
            bits=bits,
            codes=packer.take(f"{name}.codes", (H, W, D * low // 8), 1),
            high=packer.take(f"{name}.high", (H, W, D // 8), 1) if bits == 3 else None,
            scale=packer.take(f"{name}.scale", (H, W), 2),
            zero=packer.take(f"{name}.zero", (H, W), 2),
        )

    def planes(self) -> Iterator[Plane]:
        yield self.codes
        for plane in (self.high, self.scale, self.zero):
            if plane is not None:
                yield plane


@dataclass(frozen=True)
class PageLayout:
    """Offsets and sizes of the planes of one layer's pages.

    Parameters
    ----------
    num_kv_heads, head_size, page_size : int
        H, D and W.
    coefficients : int
        Spectral coefficients m a dim and page, 0 to W.
    itemsize : int
        Bytes of one element of the model dtype.
    k : ChannelPlanes
    v : ChannelPlanes | TokenPlanes
    page_bytes : int
        Size of a page, a multiple of 256.
    """

    num_kv_heads: int
    head_size: int
    page_size: int
    coefficients: int
    itemsize: int
    k: ChannelPlanes
    v: ChannelPlanes | TokenPlanes
    page_bytes: int = field(default=0)

    @classmethod
    def build(
        cls,
        k_bits: Bits,
        v_bits: int | Bits,
        *,
        head_size: int,
        page_size: int,
        coefficients: int,
        coefficient_bits: int,
        itemsize: int,
    ) -> PageLayout:
        """Lay out one layer.

        Parameters
        ----------
        k_bits : sequence [H][D] of 0, 2, 4, 8, 16
            Bits of each K dim; 0 keeps its spectral coefficients only, 16 keeps it raw.
        v_bits : int or sequence [H][D]
            Token codec at that many bits (2, 3, 4, 8, 16), or the channel codec per dim.
        coefficient_bits : int
            8 (one fp16 scale a coefficient row) or 16 (model dtype).
        itemsize : int
            Bytes of the model dtype.
        """
        packer = _Packer()
        H = len(k_bits)
        k = ChannelPlanes.pack(
            packer, "k", k_bits, page_size, coefficients, coefficient_bits, itemsize
        )
        v: ChannelPlanes | TokenPlanes
        if isinstance(v_bits, int):
            v = TokenPlanes.pack(packer, "v", v_bits, H, page_size, head_size, itemsize)
        else:
            v = ChannelPlanes.pack(
                packer, "v", v_bits, page_size, coefficients, coefficient_bits, itemsize
            )
        return cls(
            num_kv_heads=H,
            head_size=head_size,
            page_size=page_size,
            coefficients=coefficients,
            itemsize=itemsize,
            k=k,
            v=v,
            page_bytes=align(packer.end, PAGE_ALIGNMENT),
        )

    @property
    def raw_bytes(self) -> int:
        """Bytes the same tokens take uncompressed, in model dtype."""
        return 2 * self.num_kv_heads * self.page_size * self.head_size * self.itemsize

    @property
    def ratio(self) -> float:
        """Raw bytes over page bytes."""
        return self.raw_bytes / self.page_bytes

    def planes(self) -> list[Plane]:
        """Every plane that holds bytes, in order."""
        return [p for codec in (self.k, self.v) for p in codec.planes() if p.nbytes]
