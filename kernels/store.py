"""Copies this step's raw K and V to their cells of the local cache."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fourier_vllm.kernels.split import BATCH_POINTERS
from fourier_vllm.kernels.tables import next_power_of_2


@triton.jit(do_not_specialize=["first_cell"], do_not_specialize_on_alignment=BATCH_POINTERS)
def store_kernel(
    p_k, p_v, p_local, p_slots, stride_k, stride_v, stride_block, stride_head, stride_token, first_cell,
    D: tl.constexpr, BD: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_t = tl.program_id(0).to(tl.int64)
    slot = tl.load(p_slots + i_t)
    if slot < first_cell:
        return
    o_h, o_d = tl.arange(0, BH)[:, None], tl.arange(0, BD)[None, :]
    m_x = (o_h < H) & (o_d < D)
    p_x = p_local + slot // BLOCK * stride_block + slot % BLOCK * stride_token
    p_x += o_h * stride_head + o_d
    tl.store(p_x, tl.load(p_k + i_t * stride_k + o_h * D + o_d, mask=m_x), mask=m_x)
    tl.store(p_x + D, tl.load(p_v + i_t * stride_v + o_h * D + o_d, mask=m_x), mask=m_x)


def store(k: Tensor, v: Tensor, local: Tensor, slots: Tensor) -> None:
    """Write `k, v [T, H, D]`, heads of a row contiguous, to `local [blocks, H, block_size, 2 * D]`.

    Parameters
    ----------
    slots : Tensor [T], int64
        Cell of each token; padding (negative) and the null block's cells are left alone.
    """
    H, BLOCK = local.shape[1:3]
    D = local.shape[3] // 2
    store_kernel[(len(slots),)](
        k, v, local, slots, k.stride(0), v.stride(0), *local.stride()[:3], BLOCK,
        D=D, BD=next_power_of_2(D, 1), H=H, BH=next_power_of_2(H, 1), BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
