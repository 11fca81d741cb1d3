"""Joins the parts of split attention, undoes V's rotation once a row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fourier_vllm.kernels.tables import Tables

LN_2 = 0.6931471805599453


@triton.jit
def load_weights(p_lse, o_m, m_m, o_n, num_splits):
    """Log-sum-exps of parts `o_n [BN]` of rows `o_m [BM]`, `[BM, BN]`."""
    m_n = m_m[:, None] & (o_n < num_splits)[None, :]
    return tl.load(p_lse + o_m[:, None] * num_splits + o_n[None, :], mask=m_n, other=-float("inf"))


@triton.jit
def add_parts(
    b_acc, p_acc, p_lse, o_m, m_m, b_max, o_d, num_splits, first, last,
    D: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Add dims `o_d` of the parts `first` to `last` with their weights, `[BM, BD]`."""
    for i_n in range(first, last, BN):
        o_n = i_n + tl.arange(0, BN)
        b_w = tl.exp2(load_weights(p_lse, o_m, m_m, o_n, num_splits) - b_max[:, None])
        b_w = tl.where((o_n < last)[None, :], b_w, 0.0)
        # There are parts for the longest context, which a short one leaves empty and unwritten.
        m_w = b_w != 0.0
        if tl.sum(tl.sum(m_w.to(tl.int32), 1), 0) > 0:
            o_p = o_m[:, None] * num_splits + o_n[None, :]
            m_x = m_w[:, :, None] & (o_d < D)[None, None, :]
            b_x = tl.load(p_acc + o_p[:, :, None] * D + o_d[None, None, :], mask=m_x, other=0.0)
            b_acc += tl.sum(b_w[:, :, None] * b_x, 1)
    return b_acc


@triton.jit(do_not_specialize=["num_rows", "num_splits", "rotated"])
def reduce_kernel(
    p_acc, p_lse, p_rotation, p_out, p_out_lse, num_rows, num_splits, num_heads, stride_out, rotated,
    D: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    WITH_LSE: tl.constexpr, LN2: tl.constexpr,
):  # fmt: skip
    o_m = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    m_m = o_m < num_rows
    o_d = tl.arange(0, BD)
    b_max = tl.full([BM], -float("inf"), tl.float32)
    for i_n in range(0, num_splits, BN):
        o_n = i_n + tl.arange(0, BN)
        b_max = tl.maximum(b_max, tl.max(load_weights(p_lse, o_m, m_m, o_n, num_splits), 1))
    b_safe = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_sum = tl.zeros([BM], tl.float32)
    for i_n in range(0, num_splits, BN):
        o_n = i_n + tl.arange(0, BN)
        b_lse = load_weights(p_lse, o_m, m_m, o_n, num_splits)
        b_sum += tl.sum(tl.exp2(b_lse - b_safe[:, None]), 1)
    b_acc = tl.zeros([BM, BD], tl.float32)
    for i_k in range(0, BD, BK):
        o_k = i_k + tl.arange(0, BK)
        b_x = tl.zeros([BM, BK], tl.float32)
        b_x = add_parts(b_x, p_acc, p_lse, o_m, m_m, b_safe, o_k, num_splits, 0, rotated, D, BN)
        b_r = tl.load(p_rotation + o_d[None, :] * BD + o_k[:, None])
        if BM >= 16:
            b_acc = tl.dot(b_x, b_r, b_acc, input_precision="tf32x3")
        else:
            b_acc += tl.sum(b_x[:, :, None] * b_r[None, :, :], 1)
    b_acc = add_parts(
        b_acc, p_acc, p_lse, o_m, m_m, b_safe, o_d, num_splits, rotated, num_splits, D, BN
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
    # The rotation is read once a program: few rows get one each, many share.
    BM = 16 if T * Hq > 4 * tables.num_sms else 1
    reduce_kernel[(triton.cdiv(T * Hq, BM),)](
        acc, lse, tables.rotation, out, out if out_lse is None else out_lse,
        T * Hq, n, Hq, out.stride(0), rotated,
        D=D, BD=len(tables.rotation), BK=min(64, len(tables.rotation)),
        BM=BM, BN=4 if BM == 16 else 32, WITH_LSE=out_lse is not None, LN2=LN_2,
        num_warps=4, num_stages=1,
    )  # fmt: skip
