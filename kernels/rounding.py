"""How the kernels round and store numbers of a page."""

from __future__ import annotations

import triton
import triton.language as tl

from fourier_vllm.kernels.page_attention import FP16_MAX


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
def store_fp16(p_page, o, b_x, m):
    tl.store((p_page + 2 * o).to(tl.pointer_type(tl.float16)), b_x, mask=m)
