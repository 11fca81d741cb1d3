"""Byte layout of one sealed page: every offset the codec and the kernels use is decided here.

A page holds `page_size` (W) tokens of one attention layer for all KV heads of one rank (H heads of
size D). Planes lie one after the other, each 16-byte aligned, the page a multiple of 256 bytes:

```
channel codec (K always; V in the `paper` recipe)
    coef        [H, m, D]      int8, or model dtype   spectral coefficients, DCT-II over the W tokens
    coef_scale  [H, m]         fp16                   only with 8-bit coefficients
    raw         [R, W]         model dtype            dims kept as they are
    codes       [N, W/4]       uint8, 2-bit codes     residual codes of the C coded dims
    scale, zero [C]            fp16                   per coded dim
token codec (V otherwise), after an orthonormal rotation of the head's D dims when b < 16
    codes       [b/2, H, W/4, D]  uint8, 2-bit codes  3 bits: one such plane and `high`
    high        [H, W/8, D]       uint8, 1-bit codes  only with 3 bits
    scale, zero [H, W]            fp16                per token
    (16 bits: codes [H, W, D] in model dtype, nothing else)
```

A residual of b = 2, 4 or 8 bits is cut into b/2 columns of 2-bit codes, the lowest first, so that
everything that is unpacked is a column of 2-bit codes, worth 4^level each. Coded dims are sorted by
head, then bits (most first), then dim. Codes are packed along the tokens: of s = W/4 bytes (W/8 in
`high`), byte j holds the codes of tokens j, j + s, j + 2s, ..., lowest bits first, so that one shift of
a run of bytes gives the codes of s consecutive tokens.

**Fragment order**, on GPUs: the same numbers where a lane of the tensor cores' `mma.m16n8k16` wants
them, so that masks alone turn a word of codes into operands (docs/understand/page-format.md). For layers
without raw dims, with V's token codec below 16 bits and at most 8 coefficients of 8 bits. A head's columns
are padded to a multiple of 4. With s = W/4, codes byte j as above:

```
    coef        [H, m-1, D/4, 4]  uint8  128 + coefficient of dims 4i + (0, 2, 1, 3), the second row first
    coef_scale  [H, m-1]          fp16
    codes       [N/4, 8, W/32, 4] uint8  [i, g, r]: columns 4i + (0, 2, 1, 3), byte j = 8r + g
    scale       [N]               fp16   per column, 4^level included; 0 in padding
    zero        [H, D]            fp16   of a dim without residual: its mean over the page
    v.codes     [b/2, H, W/64, D/8E, 4, 8, E, 4]  uint8  [.., k, i, t, g, r]: dim 8(E i + r) + g,
                                  bytes j = 16k + 4t + (0, 2, 1, 3); E is 4, or 2 where 32 does not divide D
    v.high      [H, W/64, D/16E, 4, 8, E, 4]  uint8  as codes, of dim 16(E i + r) + g: bit 2n for the token
                                  that has bits 2n, 2n + 1 of codes, bit 2n + 1 for the same of dim + 8;
                                  E is the largest of 4, 2, 1 that divides D/16
    v.scale, v.zero  [H, 8, 4, W/32]  fp16  [.., g, n, r]: token n s + 8r + g
    (the rows of the DCT that the coefficients belong to are rounded to fp16)
```

Worked example: one head of size 8, W = 32, m = 1 coefficient of 8 bits, V at 2 bits. The dims have
8, 4, 2, 2 and no bits: 4 + 2 + 1 + 1 = 8 columns of 8 bytes.

>>> layout = PageLayout.build([[8, 4, 2, 2, 0, 0, 0, 0]], 2, head_size=8, page_size=32,
...                           coefficients=1, coefficient_bits=8, itemsize=2)
>>> [(p.name, p.offset, p.nbytes) for p in layout.planes()]   # doctest: +NORMALIZE_WHITESPACE
[('k.coef', 0, 8), ('k.coef_scale', 16, 2), ('k.codes', 32, 64), ('k.scale', 96, 8),
 ('k.zero', 112, 8), ('v.codes', 128, 64), ('v.scale', 192, 64), ('v.zero', 256, 64)]
>>> layout.page_bytes, layout.raw_bytes
(512, 1024)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

PLANE_ALIGNMENT = 16
COLUMN_GROUP = 4  # columns of codes that share words in fragment order
MAX_FRAGMENT_COEFFICIENTS = 8
PAGE_ALIGNMENT = 256
CODE_BITS = 2  # of one code in a row

Bits = Sequence[Sequence[int]]


def align(n: int, to: int) -> int:
    """Round `n` up to a multiple of `to`."""
    return -(-n // to) * to


def run_of(n: int) -> int:
    """E of fragment order, the words of a lane that lie together, of `n` runs of dims."""
    return next(run for run in (4, 2, 1) if n % run == 0)


def head_starts(dims: Sequence[int], head_size: int, num_heads: int) -> list[int]:
    """Where each head begins among `dims` (head * D + dim) sorted by head, and the end: H + 1 places."""
    return [bisect_left(dims, head * head_size) for head in range(num_heads + 1)]


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
    """Planes of the channel codec.

    Attributes
    ----------
    raw_dims : tuple of int
        `head * D + dim` of the dims kept raw, `[R]`.
    coded_dims, coded_bits : tuple of int
        `head * D + dim` and bits (2, 4, 8) of the coded dims, `[C]`.
    column_starts : tuple of int
        Where each head's columns begin in `codes`, and the end, `[H + 1]`.
    """

    raw_dims: tuple[int, ...]
    coded_dims: tuple[int, ...]
    coded_bits: tuple[int, ...]
    column_starts: tuple[int, ...]
    coef: Plane
    coef_scale: Plane | None
    raw: Plane
    codes: Plane
    scale: Plane
    zero: Plane

    @classmethod
    def pack(
        cls,
        packer: _Packer,
        name: str,
        bits: Bits,
        W: int,
        m: int,
        coef_bits: int,
        itemsize: int,
        fragments: bool,
    ) -> ChannelPlanes:
        H, D = len(bits), len(bits[0])
        raw, coded, starts = [], [], [0]
        for head, row in enumerate(bits):
            raw += [head * D + dim for dim, b in enumerate(row) if b == 16]
            some = [(head * D + dim, b) for dim, b in enumerate(row) if 0 < b < 16]
            coded += sorted(some, key=lambda x: (-x[1], x[0]))
            num_columns = sum(b for _, b in some) // CODE_BITS
            starts.append(starts[-1] + align(num_columns, COLUMN_GROUP if fragments else 1))
        rows = max(m - 1, 0) if fragments else m
        return cls(
            raw_dims=tuple(raw),
            coded_dims=tuple(dim for dim, _ in coded),
            coded_bits=tuple(b for _, b in coded),
            column_starts=tuple(starts),
            coef=packer.take(f"{name}.coef", (H, rows, D), 1 if coef_bits == 8 else itemsize),
            coef_scale=packer.take(f"{name}.coef_scale", (H, rows), 2) if coef_bits == 8 else None,
            raw=packer.take(f"{name}.raw", (len(raw), W), itemsize),
            codes=packer.take(f"{name}.codes", (starts[-1], W * CODE_BITS // 8), 1),
            scale=packer.take(f"{name}.scale", (starts[-1] if fragments else len(coded),), 2),
            zero=packer.take(f"{name}.zero", (H, D) if fragments else (len(coded),), 2),
        )

    def columns(self) -> list[tuple[int, int]]:
        """Coded dim (an index into `coded_dims`) and level of every column of `codes`, without padding."""
        return [
            (i, level) for i, b in enumerate(self.coded_bits) for level in range(b // CODE_BITS)
        ]

    def places(self, head_size: int) -> list[int]:
        """Where in `codes` those columns are."""
        free, places = list(self.column_starts), []
        for i, _ in self.columns():
            head = self.coded_dims[i] // head_size
            places.append(free[head])
            free[head] += 1
        return places

    def planes(self) -> Iterator[Plane]:
        yield self.coef
        if self.coef_scale is not None:
            yield self.coef_scale
        yield from (self.raw, self.codes, self.scale, self.zero)


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
        return cls(
            bits=bits,
            codes=packer.take(f"{name}.codes", (bits // 2, H, W * CODE_BITS // 8, D), 1),
            high=packer.take(f"{name}.high", (H, W // 8, D), 1) if bits == 3 else None,
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
    fragments : bool
        In fragment order.
    """

    num_kv_heads: int
    head_size: int
    page_size: int
    coefficients: int
    itemsize: int
    k: ChannelPlanes
    v: ChannelPlanes | TokenPlanes
    page_bytes: int = field(default=0)
    fragments: bool = False

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
        fragments: bool = False,
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
        fragments : bool
            Use fragment order if the layer can have it.
        """
        packer = _Packer()
        H = len(k_bits)
        fragments = (
            fragments
            and isinstance(v_bits, int)
            and v_bits < 16
            and not any(16 in row for row in k_bits)
            and coefficient_bits == 8
            and coefficients <= MAX_FRAGMENT_COEFFICIENTS
            and page_size % 64 == 0
            and head_size % 16 == 0
        )
        k = ChannelPlanes.pack(
            packer, "k", k_bits, page_size, coefficients, coefficient_bits, itemsize, fragments
        )
        v: ChannelPlanes | TokenPlanes
        if isinstance(v_bits, int):
            v = TokenPlanes.pack(packer, "v", v_bits, H, page_size, head_size, itemsize)
        else:
            v = ChannelPlanes.pack(
                packer, "v", v_bits, page_size, coefficients, coefficient_bits, itemsize, False
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
            fragments=fragments,
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
