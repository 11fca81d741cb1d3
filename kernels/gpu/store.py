"""Copies this step's raw K and V to their cells of the local cache, for `seal.py`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_tokens(
    p_k, p_v, p_local, p_slots, i_h, first, step, T, stride_k, stride_v, stride_block, stride_head,
    stride_token, D: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Tiles of `BT` tokens, every `step`-th from `first` on, of one head.

    Padding (negative slots) and the null block's cells are left alone.
    """
    o_d = tl.arange(0, BD)
    for i_t in range(first * BT, T, step * BT):
        o_t = i_t + tl.arange(0, BT)
        b_slot = tl.load(p_slots + o_t, mask=o_t < T, other=-1)
        m_x = (b_slot >= BLOCK)[:, None] & (o_d < D)[None, :]
        o_x = b_slot // BLOCK * stride_block + i_h * stride_head + b_slot % BLOCK * stride_token
        p_x = p_local + o_x[:, None] + o_d[None, :]
        o_new = o_t.to(tl.int64)[:, None]
        b_k = tl.load(p_k + o_new * stride_k + i_h * D + o_d[None, :], mask=m_x)
        tl.store(p_x, b_k, mask=m_x)
        b_v = tl.load(p_v + o_new * stride_v + i_h * D + o_d[None, :], mask=m_x)
        tl.store(p_x + D, b_v, mask=m_x)
