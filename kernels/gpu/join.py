"""Joins the parts of split attention, undoes V's rotation once a row."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fourier_vllm.kernels.gpu.step import Parts
from fourier_vllm.kernels.gpu.tables import Tables


class Tile(NamedTuple):
    """Of a program: rows, dims of the output; parts of pages, of raw tokens, and log-sum-exps at a time."""

    BM: int
    BO: int
    BN: int
    BR: int
    BL: int


FEW, SOME, MANY = Tile(1, 32, 32, 8, 256), Tile(4, 64, 16, 8, 64), Tile(16, 64, 4, 2, 16)


@triton.jit
def load_lse(p_lse, o_m, m_m, o_n, last, num_splits):
    """Log-sum-exps of those of the parts `o_n [BN]` that come before `last`, `[BM, BN]`."""
    m_n = m_m[:, None] & (o_n < last)[None, :]
    return tl.load(p_lse + o_m[:, None] * num_splits + o_n[None, :], mask=m_n, other=-float("inf"))


@triton.jit
def load_parts(p_acc, o_m, m_n, o_n, o_d, num_splits, D: tl.constexpr):
    """Dims `o_d [BX]` of parts `o_n [BN]` of rows `o_m [BM]`, `[BM, BN, BX]`."""
    m_x = m_n[:, :, None] & (o_d < D)[None, None, :]
    o_p = o_m[:, None] * num_splits + o_n[None, :]
    return tl.load(p_acc + o_p[:, :, None] * D + o_d[None, None, :], mask=m_x, other=0.0)


@triton.jit
def weighted(b_x, b_w):
    """Sum of parts `[BM, BN, BX]`; those of weight 0 were never written, and may be anything."""
    return tl.sum(tl.where((b_w != 0.0)[:, :, None], b_x * b_w[:, :, None], 0.0), 1)


@triton.jit(do_not_specialize=["num_rows", "num_splits", "rotated"])
def join_kernel(
    p_acc, p_lse, p_rotation, p_out, num_rows, num_splits, num_heads, stride_out, rotated,
    D: tl.constexpr, BD: tl.constexpr, BO: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BR: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """Join BO dims of BM rows, a row being a query head of a token. Grid: (tiles of rows, tiles of dims).

    The first `rotated` of `num_splits` parts are of pages: their sum is turned back before it meets
    the others.
    """
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    m_m = o_m < num_rows
    o_k, o_d = tl.arange(0, BD), tl.program_id(1) * BO + tl.arange(0, BO)
    # A short kernel lasts as long as its longest chain of loads: what needs no other's result comes first.
    o_n, o_r = tl.arange(0, BN), rotated + tl.arange(0, BR)
    m_n, m_r = m_m[:, None] & (o_n < rotated)[None, :], m_m[:, None] & (o_r < num_splits)[None, :]
    b_lse_n = load_lse(p_lse, o_m, m_m, o_n, rotated, num_splits)
    b_lse_r = load_lse(p_lse, o_m, m_m, o_r, num_splits, num_splits)
    b_n = load_parts(p_acc, o_m, m_n, o_n, o_k, num_splits, D)
    b_raw = load_parts(p_acc, o_m, m_r, o_r, o_d, num_splits, D)
    b_rotation = tl.load(p_rotation + o_d[None, :] * BD + o_k[:, None])

    b_max = tl.full([BM], -float("inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    for i_l in range(0, num_splits, BL):
        b_lse = load_lse(p_lse, o_m, m_m, i_l + tl.arange(0, BL), num_splits, num_splits)
        b_new = tl.maximum(b_max, tl.max(b_lse, 1))
        b_safe = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp2(b_max - b_safe) + tl.sum(tl.exp2(b_lse - b_safe[:, None]), 1)
        b_max = b_new
    b_safe = tl.where(b_max == -float("inf"), 0.0, b_max)[:, None]

    b_x = weighted(b_n, tl.exp2(b_lse_n - b_safe))
    for i_n in range(BN, rotated, BN):
        b_w = tl.exp2(load_lse(p_lse, o_m, m_m, i_n + o_n, rotated, num_splits) - b_safe)
        m_w = b_w != 0.0
        # There are parts for the longest context, which a short one leaves empty.
        if tl.sum(tl.sum(m_w.to(tl.int32), 1), 0) > 0:
            b_x += weighted(load_parts(p_acc, o_m, m_w, i_n + o_n, o_k, num_splits, D), b_w)
    b_acc = weighted(b_raw, tl.exp2(b_lse_r - b_safe))
    for i_r in range(BR, num_splits - rotated, BR):
        b_w = tl.exp2(load_lse(p_lse, o_m, m_m, i_r + o_r, num_splits, num_splits) - b_safe)
        b_acc += weighted(load_parts(p_acc, o_m, b_w != 0.0, i_r + o_r, o_d, num_splits, D), b_w)
    if BM >= 16:
        b_acc = tl.dot(b_x, b_rotation, b_acc, input_precision="tf32x3")
    else:
        b_acc += tl.sum(b_x[:, :, None] * b_rotation[None, :, :], 1)

    b_some = tl.where(b_sum > 0, b_sum, 1.0)
    p_row = p_out + (o_m // num_heads) * stride_out + (o_m % num_heads) * D
    b_out = (b_acc / b_some[:, None]).to(p_out.dtype.element_ty)
    tl.store(p_row[:, None] + o_d[None, :], b_out, mask=m_m[:, None] & (o_d < D)[None, :])


def tile_of(num_rows: int, num_sms: int) -> Tile:
    """Every program reads its share of the rotation: few rows get programs of their own, many share them."""
    if 2 * num_rows <= num_sms:
        return FEW
    return SOME if num_rows <= 4 * num_sms else MANY


def join_parts(tables: Tables, parts: Parts, out: Tensor) -> None:
    """Join parts into `out [T, Hq, D]`, heads of a row contiguous; 0 where all parts are empty."""
    acc, lse, rotated = parts.acc, parts.lse, parts.of_pages
    T, Hq, n, D = acc.shape
    BD = len(tables.rotation)
    BM, BO, BN, BR, BL = tile_of(T * Hq, tables.num_sms)
    BO = min(BO, BD)
    join_kernel[(triton.cdiv(T * Hq, BM), BD // BO)](
        acc, lse, tables.rotation, out, T * Hq, n, Hq, out.stride(0), rotated,
        D=D, BD=BD, BO=BO, BM=BM, BN=BN, BR=BR, BL=BL, num_warps=4, num_stages=1,
    )  # fmt: skip
