"""Lays queries out by column of codes, once a step: pages in fragment order then read them as they lie."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fourier_vllm.kernels.gpu.split import LOG2_E
from fourier_vllm.kernels.gpu.step import Layer, Parts


@triton.jit
def query_columns_kernel(
    p_q, p_columns, p_column_start, p_column_dim, stride_q, q_scale,
    G: tl.constexpr, D: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Lay out one query head of one token, BN columns at a time. Grid: (T, Hq)."""
    i_row, i_h, num_heads = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    start, stop = tl.load(p_column_start + i_h // G) * 4, tl.load(p_column_start + i_h // G + 1) * 4
    for i_n in range(start, stop, BN):
        o_n = i_n + tl.arange(0, BN)
        b_dim = tl.load(p_column_dim + o_n, mask=o_n < stop, other=-1)
        b_q = tl.load(p_q + i_row * stride_q + i_h * D + b_dim, mask=b_dim >= 0, other=0.0)
        p_x = p_columns + (i_row * num_heads + i_h) * N + (o_n - start)
        tl.store(p_x, (b_q.to(tl.float32) * q_scale).to(tl.float16), mask=o_n < stop)


def query_columns(layer: Layer, q: Tensor, parts: Parts) -> None:
    """Write `q [T, Hq, D]`, scaled for base-2 softmax, to `parts.columns`.

    Pages in plain order read queries as they are: nothing is written.
    """
    tables = layer.tables
    if not tables.layout.fragments:
        return
    T, Hq, D = q.shape
    k = tables.k
    query_columns_kernel[(T, Hq)](
        q, parts.columns, k.column_start, k.column_dim, q.stride(0), layer.scale * LOG2_E,
        G=Hq // tables.layout.num_kv_heads, D=D, N=tables.num_columns, BN=256, num_warps=1,
    )  # fmt: skip
