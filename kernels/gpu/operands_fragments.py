"""Reads pages in fragment order (`page.py`): words of bytes become operands of `mma` without moving.

A lane of a warp loads the words that its operands are made of. What `reshape` and `permute` say here is
where the numbers already are, so that the compiler has nothing to do; elsewhere than on NVIDIA's tensor
cores they are moved, and the result is the same. Masked codes and bytes are taken as fp16 subnormals, worth
2^-24 a unit. In shapes: g of 8, t of 4 are a lane's place, e of 2 a pair of operands, h of 2 its two pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl

PREFETCH = tl.constexpr("prefetch.global.L2 [$1]; mov.b32 $0, 0;")
LINE = tl.constexpr(128)
UNIT = tl.constexpr(2.0**24)  # a subnormal's bits as a number


@triton.jit
def pairs(b_w):
    """Words `[...]` as fp16 `[..., 2]`, the low half first."""
    b_low = b_w.to(tl.uint16).to(tl.float16, bitcast=True)
    b_high = (b_w >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.join(b_low, b_high)


@triton.jit
def masked_bytes(b_w, MASK: tl.constexpr):
    """`MASK` of the bytes of words `[...]`, as fp16 subnormals `[..., e, h]`."""
    return tl.join(pairs(b_w & MASK), pairs((b_w >> 8) & MASK))


@triton.jit
def load_words(p_words, o_x, m_x, N: tl.constexpr):
    """N words at each of `o_x`, which are multiples of N."""
    p_x = p_words + tl.multiple_of(o_x, N)[:, None] + tl.arange(0, N)[None, :]
    return tl.load(p_x, mask=m_x[:, None], other=0)


@triton.jit
def column_codes(b_w, SHIFT: tl.constexpr, NT: tl.constexpr, E: tl.constexpr):
    """Words `[NT * 32, E]` of columns as codes `[8 * E, NT * 16]`, tokens by columns."""
    b_x = tl.reshape(masked_bytes(b_w, 0x00030003 << SHIFT), (NT, 8, 4, E, 2, 2))  # n g t r e h
    return tl.reshape(tl.permute(b_x, (3, 1, 0, 2, 5, 4)), (8 * E, NT * 16))


@triton.jit
def row_codes(b_w, MASK: tl.constexpr, KT: tl.constexpr, ND: tl.constexpr, E: tl.constexpr):
    """Words `[KT * ND * 32, E]` of dims as codes `[8 * E * ND, KT * 16]`, dims by tokens."""
    b_x = tl.reshape(masked_bytes(b_w, MASK), (KT, ND, 8, 4, E, 2, 2))  # k i g t r e h
    return tl.reshape(tl.permute(b_x, (1, 4, 2, 0, 3, 6, 5)), (8 * E * ND, KT * 16))


@triton.jit
def high_codes(b_w, MASK: tl.constexpr, KT: tl.constexpr, ND: tl.constexpr, E: tl.constexpr):
    """Words of the 1-bit plane as bits `[16 * E * ND, KT * 16]`, dims by tokens."""
    b_x = tl.join(masked_bytes(b_w, MASK), masked_bytes(b_w >> 1, MASK))
    b_x = tl.reshape(b_x, (KT, ND, 8, 4, E, 2, 2, 2))  # k i g t r e h (dim + 8)
    return tl.reshape(tl.permute(b_x, (1, 4, 7, 2, 0, 3, 6, 5)), (16 * E * ND, KT * 16))


@triton.jit
def column_operand(b_w, NT: tl.constexpr, BM: tl.constexpr):
    """Words `[NT * BM * 4, 2]` of fp16 by column, as `[NT * 16, BM]`."""
    b_x = tl.reshape(pairs(b_w), (NT, BM, 4, 2, 2))  # n row t h e
    return tl.reshape(tl.permute(b_x, (0, 2, 3, 4, 1)), (NT * 16, BM))


@triton.jit
def repeat_columns(b_x, N: tl.constexpr, BM: tl.constexpr):
    """`[N, 8]` side by side, `[N, BM]`."""
    if BM == 8:
        return b_x
    return tl.reshape(tl.broadcast_to(b_x[:, None, :], (N, BM // 8, 8)), (N, BM))


@triton.jit
def load_token_numbers(p_words, o_x, E: tl.constexpr, BM: tl.constexpr):
    """fp16 of the tokens of two slices at words `o_x + (2 * i_g + slice / 2) * E`, `[8 * E, BM]` each."""
    o_l = tl.arange(0, 32)
    b_w = load_words(p_words + o_x, o_l // 4 * (2 * E), o_l >= 0, E)  # [32, E]
    b_x = tl.reshape(pairs(b_w).to(tl.float32), (8, 4, 2, E))  # g t slice r
    b_x, b_y = tl.split(tl.reshape(tl.permute(b_x, (3, 0, 1, 2)), (8 * E, 4, 2)))
    b_x = tl.reshape(tl.join(b_x, b_x), (8 * E, 8))
    b_y = tl.reshape(tl.join(b_y, b_y), (8 * E, 8))
    return repeat_columns(b_x, 8 * E, BM), repeat_columns(b_y, 8 * E, BM)


@triton.jit
def place_of_dim(o_k):
    """Dim of operand row `o_k` where 64 dims are read as 16 a lane."""
    return o_k // 64 * 64 + o_k % 16 // 4 * 16 + o_k // 16 % 4 * 4 + o_k % 4


@triton.jit
def coefficient_operand(p_words, o_coef, M, D: tl.constexpr, BD: tl.constexpr):
    """Rows of biased 8-bit coefficients, as subnormals `[16, BD]`, dims as `place_of_dim` says."""
    C: tl.constexpr = BD // 64
    o_l = tl.arange(0, C * 32)
    i_g, o_d = o_l // 4 % 8, o_l // 32 * 64 + o_l % 4 * 16
    b_w = load_words(p_words + o_coef, (i_g * D + o_d) // 4, (i_g < M) & (o_d < D), 4)
    b_x = tl.reshape(masked_bytes(b_w, 0x00FF00FF), (C, 8, 4, 4, 2, 2))  # c g t w e h
    b_x = tl.reshape(tl.permute(b_x, (1, 0, 3, 2, 5, 4)), (8, BD))
    return eight_rows(b_x, BD)


@triton.jit
def zero_operand(p_words, o_zero, D: tl.constexpr, BD: tl.constexpr):
    """The plane of zeros as row 7 of `[16, BD]`, dims as `place_of_dim` says."""
    C: tl.constexpr = BD // 64
    o_l = tl.arange(0, C * 64)
    o_d = o_l // 64 * 64 + o_l % 4 * 16
    o_w = (o_d + o_l // 32 % 2 * 8) // 2
    b_w = load_words(p_words + o_zero, o_w, (o_l // 4 % 8 == 7) & (o_d < D), 4)
    b_x = tl.reshape(pairs(b_w), (C, 2, 8, 4, 2, 2, 2))  # c (w / 2) g t (w % 2) h e
    b_x = tl.reshape(tl.permute(b_x, (2, 0, 1, 4, 3, 5, 6)), (8, BD))
    return eight_rows(b_x, BD)


@triton.jit
def eight_rows(b_x, N: tl.constexpr):
    """`[8, N]` with eight rows of zeros below."""
    b_x = tl.join(b_x, tl.zeros_like(b_x))
    return tl.reshape(tl.permute(b_x, (2, 0, 1)), (16, N))


@triton.jit
def two_terms(b_y, BM: tl.constexpr):
    """The first 8 rows of float32 `[16, BM]` as an operand of two fp16 terms `[16, BM]`."""
    b_y, _ = tl.split(tl.permute(tl.reshape(b_y, (2, 8, BM)), (1, 2, 0)))
    b_high = b_y.to(tl.float16)
    b_low = (b_y - b_high.to(tl.float32)).to(tl.float16)
    b_x = tl.reshape(tl.join(b_high, b_low), (4, 2, BM, 2))  # t e row h
    return tl.reshape(tl.permute(b_x, (0, 3, 1, 2)), (16, BM))


@triton.jit
def add_basis(b_s, p_basis, b_y, SLICE: tl.constexpr, E: tl.constexpr):
    """Add a slice of the basis times `two_terms`, `[8 * E, BM]`."""
    o_l = tl.arange(0, 32)
    b_x = pairs(load_words(p_basis + SLICE * 32 * E, o_l * E, o_l >= 0, E))  # [32, E, e]
    b_x = tl.reshape(tl.join(b_x, b_x), (8, 4, E, 2, 2))  # g t r e h
    return tl.dot(tl.reshape(tl.permute(b_x, (2, 0, 1, 4, 3)), (8 * E, 16)), b_y, b_s)


@triton.jit
def lines_of(o_x, num_bytes, N: tl.constexpr):
    """Where N cache lines of a plane begin; those behind its end are the first again."""
    o_n = tl.arange(0, N) * LINE
    return o_x + tl.where(o_n < num_bytes, o_n, 0)


@triton.jit
def prefetch(p_page, o_lines, ASM: tl.constexpr):
    """Bring cache lines of a page into L2: it costs no registers to have the next page under way."""
    if ASM:
        tl.inline_asm_elementwise(
            PREFETCH, "=r,l", [(p_page + o_lines).to(tl.int64)], tl.int32, is_pure=False, pack=1
        )
