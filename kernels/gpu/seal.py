"""Stores a step's raw K and V and seals the pages they complete, in bytes of `page.py`: one launch a layer.

Which pages are complete is read from the lengths on the device. A program takes one KV head and every n-th
item, which is K or V of a page, n odd so that both come in turn; where there are none, programs end at once.
Sealing reads this step's tokens where they come from, older ones from cells that storing leaves alone.
Shapes: W tokens, BD dims, ET tokens of each eighth of a page, so that packing finds all tokens of a byte in
one tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourier_vllm.kernels.gpu.launch import Launch
from fourier_vllm.kernels.gpu.seal_fragments import seal_columns, seal_rotated, token_of_row
from fourier_vllm.kernels.gpu.seal_plain import seal_channel, seal_tokens
from fourier_vllm.kernels.gpu.split import BATCH_POINTERS, TL_DTYPES
from fourier_vllm.kernels.gpu.step import Layer, Step
from fourier_vllm.kernels.gpu.store import store_tokens
from fourier_vllm.kernels.gpu.tables import Tables, next_power_of_2
from fourier_vllm.kernels.ranges import range_share
from fourier_vllm.page import run_of

PROGRAMS_PER_SM = 2  # as many as registers hold
TOKENS_AT_ONCE = 16  # stored by a program


@triton.jit
def load_tokens(
    o_t, o_d, is_new, p_new, p_local, p_table, i_h, is_v, start, context, stride_new, stride_block,
    stride_head, stride_token, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Dims `o_d` of tokens at `o_t [n]`, float32: from this step, all if `is_new`, or the local cache."""
    m_d = (o_d < D)[None, :]
    o_x = (start + o_t - context).to(tl.int64) * stride_new + i_h * D
    p_x = p_new + o_x[:, None] + o_d[None, :]
    if is_new:
        b_x = tl.load(p_x, mask=m_d, other=0.0).to(tl.float32)
    else:
        m_new = o_t >= context
        b_new = tl.load(p_x, mask=m_new[:, None] & m_d, other=0.0)
        block = tl.load(p_table + o_t // BLOCK, mask=~m_new, other=0).to(tl.int64)
        o_l = block * stride_block + i_h * stride_head + (o_t % BLOCK) * stride_token + is_v * D
        b_old = tl.load(
            p_local + o_l[:, None] + o_d[None, :], mask=~m_new[:, None] & m_d, other=0.0
        )
        b_x = tl.where(m_new[:, None], b_new.to(tl.float32), b_old.to(tl.float32))
    return b_x


@triton.jit
def load_signs(p_x, DTYPE: tl.constexpr):
    """Sign bits as +-1."""
    ONE: tl.constexpr = 0x3F80 if tl.bfloat16 == DTYPE else 0x3C00
    return (tl.load(p_x) | ONE).to(DTYPE, bitcast=True)


@triton.jit
def without_pinned(b_x, o_w, num_pinned, b_mean):
    """Pinned tokens are read raw: their outsized keys shall cost no precision."""
    return tl.where((o_w < num_pinned)[:, None], b_mean[None, :], b_x)


@triton.jit
def mean_of_others(b_x, num_pinned, W: tl.constexpr):
    o_w = tl.arange(0, W)
    b_sum = tl.sum(tl.where((o_w >= num_pinned)[:, None], b_x, 0.0), 0)
    return b_sum / tl.maximum(W - num_pinned, 1).to(tl.float32)


@triton.jit
def load_page(
    i_p, num_pinned, p_new, p_local, p_table, i_h, is_v, start, context, stride_new, stride_block,
    stride_head, stride_token, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A page without its pinned tokens, `[W, BD]` float32."""
    o_w = tl.arange(0, W)
    b_x = load_tokens(i_p * W + o_w, tl.arange(0, BD), i_p * W >= context, p_new, p_local, p_table,
                      i_h, is_v, start, context, stride_new, stride_block, stride_head,
                      stride_token, D, BLOCK)  # fmt: skip
    if num_pinned > 0:
        b_x = without_pinned(b_x, o_w, num_pinned, mean_of_others(b_x, num_pinned, W))
    return b_x


@triton.jit
def seal_page(
    i_b, i_h, is_v, i_p, start, context,
    p_k, p_v, p_local, p_local_table, p_pages, p_page_table,
    p_basis, p_signs, p_sign_bits, p_k_dims, p_v_dims, p_column_start, p_column_dim, p_column_level,
    ok_coef, ok_coef_scale, ok_raw, ok_codes, ok_scale, ok_zero,
    ov_coef, ov_coef_scale, ov_raw, ov_codes, ov_scale, ov_zero, ov_high,
    stride_k, stride_v, stride_block, stride_head, stride_token, stride_local_table,
    stride_page, stride_page_table, signs_scale, S, M,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr,
    ET: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr, V_BITS: tl.constexpr,
    SHARE: tl.constexpr, DTYPE: tl.constexpr,
    K_SMALL: tl.constexpr, K_CODES: tl.constexpr, K_RAW: tl.constexpr,
    V_SMALL: tl.constexpr, V_CODES: tl.constexpr, V_RAW: tl.constexpr,
    FRAGMENTS: tl.constexpr, MEANS: tl.constexpr, EV: tl.constexpr, EH: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Seal page `i_p` of request `i_b`, whose step's tokens begin at `start`, after `context` ones."""
    page = tl.load(p_page_table + i_b.to(tl.int64) * stride_page_table + i_p).to(tl.int64)
    p_page = p_pages + page * stride_page
    p_table = p_local_table + i_b.to(tl.int64) * stride_local_table
    o_d = tl.arange(0, BD)
    num_pinned = tl.minimum(tl.maximum(S - i_p * W, 0), W)
    if is_v == 0:
        b_x = load_page(i_p, num_pinned, p_k, p_local, p_table, i_h, 0, start, context, stride_k,
                        stride_block, stride_head, stride_token, D, BD, W, BLOCK)  # fmt: skip
        if FRAGMENTS:
            seal_columns(b_x, p_page, i_h, p_basis, p_k_dims, p_column_start, p_column_dim,
                         p_column_level, ok_coef, ok_coef_scale, ok_codes, ok_scale, ok_zero, M, H, D, BD, W,
                         MEANS)  # fmt: skip
        else:
            seal_channel(b_x, p_page, i_h, p_basis, p_k_dims, ok_coef, ok_coef_scale, ok_raw,
                         ok_codes, ok_scale, ok_zero, M, H, D, BD, W, K_SMALL, K_CODES, K_RAW,
                         DTYPE)  # fmt: skip
    elif V_BITS == 0:
        b_x = load_page(i_p, num_pinned, p_v, p_local, p_table, i_h, 1, start, context, stride_v,
                        stride_block, stride_head, stride_token, D, BD, W, BLOCK)  # fmt: skip
        seal_channel(b_x, p_page, i_h, p_basis, p_v_dims, ov_coef, ov_coef_scale, ov_raw,
                     ov_codes, ov_scale, ov_zero, M, H, D, BD, W, V_SMALL, V_CODES, V_RAW,
                     DTYPE)  # fmt: skip
    else:
        o_e = tl.arange(0, 8 * ET)
        ONCE: tl.constexpr = EXACT and BK == BD and V_BITS < 16
        if ONCE:
            b_signs = load_signs(p_sign_bits + o_d[:, None] * BD + o_d[None, :], DTYPE)
        for i_e in range(0, W // 8, ET):
            o_t = (o_e // ET) * (W // 8) + i_e + o_e % ET
            if FRAGMENTS:
                i_n, o_j = token_of_row(o_e, i_e // ET, W)
                o_t = i_n * (W // 4) + o_j
            b_turned = tl.zeros([8 * ET, BD], tl.float32)
            for i_k in range(0, BD, BK):
                o_k = i_k + tl.arange(0, BK)
                # Pinned tokens cost the others nothing here, and nobody reads them.
                b_x = load_tokens(i_p * W + o_t, o_k, i_p * W >= context, p_v, p_local, p_table,
                                  i_h, 1, start, context, stride_v, stride_block, stride_head,
                                  stride_token, D, BLOCK)  # fmt: skip
                o_r = o_k[:, None] * BD + o_d[None, :]
                if V_BITS == 16:
                    p_codes = (p_page + ov_codes).to(tl.pointer_type(DTYPE))
                    o_v = (i_h * W + o_t)[:, None] * D + o_k[None, :]
                    tl.store(p_codes + o_v, b_x.to(DTYPE), mask=(o_k < D)[None, :])
                elif ONCE:
                    b_turned = tl.dot(b_x.to(DTYPE), b_signs, b_turned)
                elif EXACT:
                    b_turned = tl.dot(b_x.to(DTYPE), load_signs(p_sign_bits + o_r, DTYPE), b_turned)
                else:
                    b_turned = tl.dot(b_x, tl.load(p_signs + o_r), b_turned, input_precision="tf32")
            if FRAGMENTS:
                seal_rotated(b_turned * signs_scale, i_e // ET, p_page, i_h, ov_codes, ov_high,
                             ov_scale, ov_zero, H, D, BD, W, V_BITS, SHARE, EV, EH)  # fmt: skip
            elif V_BITS < 16:
                seal_tokens(b_turned * signs_scale, o_t, i_e, p_page, i_h, ov_codes, ov_high,
                            ov_scale, ov_zero, H, D, BD, W, ET, V_BITS, SHARE)  # fmt: skip


@triton.jit
def completed_pages(p_seq_lens, p_query_start, o_b, B, W: tl.constexpr):
    """How many pages each of the requests `o_b` completes."""
    m_b = o_b < B
    b_len = tl.load(p_seq_lens + o_b, mask=m_b, other=0)
    b_start = tl.load(p_query_start + o_b, mask=m_b, other=0)
    b_stop = tl.load(p_query_start + o_b + 1, mask=m_b, other=0)
    # Padding has a query token and no length.
    return b_len // W - tl.maximum(b_len - (b_stop - b_start), 0) // W


@triton.jit(
    do_not_specialize=["S", "M", "B", "T", "stride_local_table", "stride_page_table"],
    do_not_specialize_on_alignment=BATCH_POINTERS,
)
def seal_kernel(
    p_k, p_v, p_local, p_local_table, p_slots, p_pages, p_page_table, p_seq_lens, p_query_start,
    stride_k, stride_v, stride_block, stride_head, stride_token, stride_page,
    stride_local_table, stride_page_table, S, B, T,
    p_basis, p_signs, p_sign_bits, p_k_dims, p_v_dims, p_column_start, p_column_dim, p_column_level,
    ok_coef, ok_coef_scale, ok_raw, ok_codes, ok_scale, ok_zero,
    ov_coef, ov_coef_scale, ov_raw, ov_codes, ov_scale, ov_zero, ov_high, signs_scale, M,
    BT: tl.constexpr, BB: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, W: tl.constexpr,
    ET: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr, V_BITS: tl.constexpr,
    SHARE: tl.constexpr, DTYPE: tl.constexpr,
    K_SMALL: tl.constexpr, K_CODES: tl.constexpr, K_RAW: tl.constexpr,
    V_SMALL: tl.constexpr, V_CODES: tl.constexpr, V_RAW: tl.constexpr,
    FRAGMENTS: tl.constexpr, MEANS: tl.constexpr, EV: tl.constexpr, EH: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Store every n-th tile of BT tokens of one KV head, seal every n-th of its items; n odd.

    Grid: (H, n, 1), with as many programs as the GPU runs at once. An item is K or V of one page that the
    step completes; requests are looked through BB at a time.
    """
    i_h, i_x, step = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    store_tokens(p_k, p_v, p_local, p_slots, i_h, i_x, step, T, stride_k, stride_v, stride_block,
                 stride_head, stride_token, D, BD, BLOCK, BT)  # fmt: skip
    done = 0
    for i_c in range(0, B, BB):
        o_b = i_c + tl.arange(0, BB)
        b_count = 2 * completed_pages(p_seq_lens, p_query_start, o_b, B, W)
        total = tl.sum(b_count, 0)
        if total > 0:
            b_end = tl.cumsum(b_count, 0)
            for i in range((i_x + step - done % step) % step, total, step):
                i_b = i_c + tl.sum((b_end <= i).to(tl.int32), 0)
                before = tl.sum(tl.where(o_b < i_b, b_count, 0), 0)
                start = tl.load(p_query_start + i_b)
                context = tl.load(p_seq_lens + i_b) - (tl.load(p_query_start + i_b + 1) - start)
                seal_page(
                    i_b, i_h, (i - before) % 2, context // W + (i - before) // 2, start,
                    context, p_k, p_v, p_local, p_local_table, p_pages, p_page_table, p_basis,
                    p_signs, p_sign_bits, p_k_dims, p_v_dims, p_column_start, p_column_dim,
                    p_column_level, ok_coef, ok_coef_scale, ok_raw, ok_codes, ok_scale, ok_zero,
                    ov_coef, ov_coef_scale, ov_raw, ov_codes, ov_scale, ov_zero, ov_high,
                    stride_k, stride_v, stride_block, stride_head, stride_token,
                    stride_local_table, stride_page, stride_page_table, signs_scale, S, M, H, D,
                    BD, W, ET, BK, BLOCK, V_BITS, SHARE, DTYPE, K_SMALL, K_CODES, K_RAW,
                    V_SMALL, V_CODES, V_RAW, FRAGMENTS, MEANS, EV, EH, EXACT,
                )  # fmt: skip
            done += total


def seal(layer: Layer, step: Step, k: Tensor, v: Tensor) -> None:
    """Store the tokens of this step and seal every page whose last token is among them, in place.

    Padding and the null block's cells are not written.

    Parameters
    ----------
    k, v : Tensor [T, H, D]
        Tokens of this step, keys after RoPE; heads of a row contiguous.
    """
    tables, launches, _, pages, local = layer
    seq_lens, query_start_loc, page_table, local_table, slots, *_ = step
    tensors = (k, v, local, local_table, slots, pages, page_table, seq_lens, query_start_loc)
    strides = (k.stride(0), v.stride(0), *local.stride()[:3], pages.stride(0))
    # What the kernel is specialized for, beside the tables.
    aligned = [x.data_ptr() % 16 == 0 for x in (k, v, local, pages)]
    key = (k.dtype, local.shape[2], strides, *aligned)
    launch = launches.get(key)
    if launch is None:
        launch = launches[key] = _launch(tables, k.dtype, local.shape[2])
    rows = local_table.stride(0), page_table.stride(0)
    sink_tokens = step.window.sink_tokens
    launch(tensors, *strides, *rows, sink_tokens, seq_lens.shape[0], slots.shape[0])


def _launch(tables: Tables, dtype: torch.dtype, block_size: int) -> Launch:
    layout, kt, vt = tables.layout, tables.k, tables.v
    H, W, D, m = layout.num_kv_heads, layout.page_size, layout.head_size, layout.coefficients
    # Signs times 16-bit values are exact in the dtype of the values.
    exact = dtype.itemsize == 2 and next_power_of_2(D) == D
    # Triton's interpreter multiplies bfloat16 as if it were integers.
    exact &= not (triton.knobs.runtime.interpret and dtype == torch.bfloat16)
    return Launch(
        seal_kernel,
        (H, (PROGRAMS_PER_SM * tables.num_sms // H - 1) | 1, 1),
        (
            tables.basis, tables.signs, tables.sign_bits, kt.dims, vt.dims,
            kt.column_start, kt.column_dim, kt.column_level, *kt.offsets, *tables.v_offsets,
            tables.signs_scale, tables.num_rows,
        ),
        dict(
            BT=TOKENS_AT_ONCE, BB=128, H=H, D=D, BD=next_power_of_2(D), W=W, ET=8,
            BK=min(128 if exact else 64, next_power_of_2(D)), BLOCK=block_size, V_BITS=tables.v_bits,
            SHARE=range_share(tables.v_bits), DTYPE=TL_DTYPES[dtype], **tables.kinds(),
            FRAGMENTS=layout.fragments, MEANS=m > 0, EV=run_of(D // 8), EH=run_of(max(D // 16, 1)),
            EXACT=exact,
        ),
        num_warps=4,
        num_stages=1,
    )  # fmt: skip
