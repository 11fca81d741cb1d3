"""Joins the parts of split attention, undoes V's rotation once a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fourier_vllm.kernels.tables import Tables

LN_2 = 0.6931471805599453


@triton.jit
def add_parts(b_acc, p_acc, p_lse, o_m, m_m, b_max, o_d, num_splits, first, last, D: tl.constexpr):
    """Add dims `o_d` of the parts `first` to `last` with their weights."""
    m_x = m_m[:, None] & (o_d < D)[None, :]
    for i in range(first, last):
        o_p = o_m * num_splits + i
        b_w = tl.exp2(tl.load(p_lse + o_p, mask=m_m, other=-float("inf")) - b_max)
        b_part = tl.load(p_acc + o_p[:, None] * D + o_d[None, :], mask=m_x, other=0.0)
        b_acc += b_w[:, None] * b_part
    return b_acc


@triton.jit
def reduce_kernel(
    p_acc, p_lse, p_rotation, p_out, p_out_lse, num_rows, num_splits, num_heads, stride_out,
    D: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, ROTATED: tl.constexpr, BM: tl.constexpr,
    WITH_LSE: tl.constexpr, LN2: tl.constexpr,
):  # fmt: skip
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    m_m = o_m < num_rows
    o_d = tl.arange(0, BD)
    b_max = tl.full([BM], -float("inf"), tl.float32)
    for i in range(num_splits):
        b_lse = tl.load(p_lse + o_m * num_splits + i, mask=m_m, other=-float("inf"))
        b_max = tl.maximum(b_max, b_lse)
    b_safe = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_sum = tl.zeros([BM], tl.float32)
    for i in range(num_splits):
        b_lse = tl.load(p_lse + o_m * num_splits + i, mask=m_m, other=-float("inf"))
        b_sum += tl.exp2(b_lse - b_safe)
    b_acc = tl.zeros([BM, BD], tl.float32)
    for i_k in range(0, BD, BK):
        o_k = i_k + tl.arange(0, BK)
        b_part = tl.zeros([BM, BK], tl.float32)
        b_part = add_parts(b_part, p_acc, p_lse, o_m, m_m, b_safe, o_k, num_splits, 0, ROTATED, D)
        b_r = tl.load(p_rotation + o_d[None, :] * BD + o_k[:, None])
        b_acc = tl.dot(b_part, b_r, b_acc, input_precision="tf32x3")
    b_acc = add_parts(
        b_acc, p_acc, p_lse, o_m, m_m, b_safe, o_d, num_splits, ROTATED, num_splits, D
    )
    b_some = tl.where(b_sum > 0, b_sum, 1.0)
    p_row = p_out + (o_m // num_heads) * stride_out + (o_m % num_heads) * D
    b_out = (b_acc / b_some[:, None]).to(p_out.dtype.element_ty)
    tl.store(p_row[:, None] + o_d[None, :], b_out, mask=m_m[:, None] & (o_d < D)[None, :])
    if WITH_LSE:
        b_lse = tl.where(b_sum > 0, (b_max + tl.log2(b_some)) * LN2, -float("inf"))
        tl.store(p_out_lse + o_m, b_lse, mask=m_m)


def reduce(
    tables: Tables, acc: Tensor, lse: Tensor, rotated: int, out: Tensor, out_lse: Tensor | None
) -> None:
    """Join parts into `out`.

    Parameters
    ----------
    acc, lse : Tensor [T, Hq, n, D], [T, Hq, n], float32
        Normalised parts and their base-2 log-sum-exps.
    rotated : int
        The first parts, at least one, which are of pages.
    out : Tensor [T, Hq, D]
        Heads of a row contiguous.
    out_lse : Tensor [T, Hq], float32, optional
        Natural log-sum-exps.
    """
    T, Hq, n, D = acc.shape
    BM = 16
    reduce_kernel[(triton.cdiv(T * Hq, BM),)](
        acc, lse, tables.rotation, out, out if out_lse is None else out_lse,
        T * Hq, n, Hq, out.stride(0),
        D=D, BD=len(tables.rotation), BK=min(64, len(tables.rotation)),
        ROTATED=rotated, BM=BM, WITH_LSE=out_lse is not None, LN2=LN_2,
        num_warps=4, num_stages=1,
    )  # fmt: skip
