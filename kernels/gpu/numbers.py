"""How the kernels round and store numbers of a page."""

from __future__ import annotations

import triton
import triton.language as tl

from fourier_vllm.kernels.gpu.operands_plain import FP16_MAX


@triton.jit
def round_half_up(b_x):
    return tl.floor(b_x + 0.5)


@triton.jit
def to_fp16(b_x):
    return tl.minimum(tl.maximum(b_x, -FP16_MAX), FP16_MAX).to(tl.float16)


@triton.jit
def step_of(b_scale):
    b_scale = b_scale.to(tl.float32)
    return tl.where(b_scale > 0, b_scale, 1.0)


@triton.jit
def sum_of_shifted(b_x, N: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr, BD: tl.constexpr):
    """Runs of rows of `[ROWS, BD]` on top of each other, `BITS` apart, `[ROWS / N, BD]`."""
    b_runs = tl.reshape(b_x, (N, ROWS // N, BD))
    return tl.sum(b_runs << (tl.arange(0, N) * BITS)[:, None, None], 0)


@triton.jit
def eight_bits(b_c):
    """A row of coefficients as whole numbers of 8 bits, and their fp16 scale."""
    scale = tl.minimum(tl.max(tl.abs(b_c), 0) / 127, FP16_MAX).to(tl.float16)
    return tl.minimum(tl.maximum(round_half_up(b_c / step_of(scale)), -127.0), 127.0), scale


@triton.jit
def range_of_tokens(
    b_x, BITS: tl.constexpr, SHARE: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """fp16 zero and scale of each of the tokens `[n, BD]`."""
    m_d = (tl.arange(0, BD) < D)[None, :]
    b_low = tl.min(tl.where(m_d, b_x, float("inf")), 1)
    b_high = tl.max(tl.where(m_d, b_x, -float("inf")), 1)
    b_cut = (b_high - b_low) * ((1.0 - SHARE) / 2)
    b_zero = to_fp16(b_low + b_cut)
    b_scale = (b_high - b_cut - b_zero.to(tl.float32)) / ((1 << BITS) - 1)
    return b_zero, to_fp16(tl.maximum(b_scale, 0.0))


@triton.jit
def store_fp16(p_page, o, b_x, m):
    tl.store((p_page + 2 * o).to(tl.pointer_type(tl.float16)), b_x, mask=m)
