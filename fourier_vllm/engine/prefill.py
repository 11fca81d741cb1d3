"""Attention of prompts on a GPU: exact inside the chunk, older tokens from pages and the local cache.

FlashAttention as vLLM ships it, where it has kernels for the GPU and dtype; else PyTorch's own attention.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.logger import init_logger

from fourier_vllm.engine.cells import load
from fourier_vllm.engine.gpu_plan import GpuPlan
from fourier_vllm.engine.metadata import FourierMetadata
from fourier_vllm.engine.plan import PrefillStep
from fourier_vllm.kernels.reference import PageCodec
from fourier_vllm.kernels.reference_attention import prefill_attention

logger = init_logger("vllm.fourier_vllm")

PAGES_AT_ONCE = 32  # rebuilt together: bounds what is held in float32


def flash_attention_version(head_size: int, dtype: torch.dtype) -> int | None:
    """The FlashAttention that vLLM would use here, None where it has none."""
    from vllm.v1.attention.backends.fa_utils import (
        get_flash_attn_version,
        is_flash_attn_varlen_func_available,
    )

    if dtype not in (torch.float16, torch.bfloat16) or not is_flash_attn_varlen_func_available():
        return None
    return get_flash_attn_version(head_size=head_size)


class Prefill:
    """Prefill attention of one layer."""

    def __init__(self, codec: PageCodec, scale: float) -> None:
        self.codec, self.scale = codec, scale
        self.version = flash_attention_version(codec.layout.head_size, codec.k.dtype)
        self.has_flash = self.version is not None
        if not self.has_flash:
            logger.warning_once(
                "fourier: no FlashAttention for this GPU or dtype; prompts use PyTorch's attention."
            )

    def run(
        self,
        plan: GpuPlan,
        metadata: FourierMetadata,
        local_metadata: FourierMetadata,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pages: torch.Tensor,
        local: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Attend the requests after the first `plan.num_decodes`; tensors as in `GpuPath.run`."""
        if plan.at_once is None:
            for step in plan.prefill:
                self._attend(step, q, k, v, pages, local, output)
            return
        n, starts = plan.num_decodes, plan.prefill_starts
        rows = slice(plan.first_prefill, int(metadata.query_start_loc_cpu[-1]))
        if plan.at_once == "flight":
            k_all, v_all = k[rows], v[rows]
            given: dict[str, Any] = dict(cu_seqlens_k=starts)
        else:
            k_all, v_all = (x.transpose(1, 2) for x in local.chunk(2, -1))
            given = dict(
                seqused_k=metadata.seq_lens[n:], block_table=local_metadata.block_table[n:]
            )
        self._flash(
            q[rows], k_all, v_all, output[rows], starts, plan.max_prefill, plan.max_seq_len, **given
        )

    def _flash(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        starts: torch.Tensor,
        max_query_len: int,
        max_seq_len: int,
        **given: Any,
    ) -> None:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        flash_attn_varlen_func(
            q=q,
            k=k,
            v=v,
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=max_query_len,
            max_seqlen_k=max_seq_len,
            softmax_scale=self.scale,
            causal=True,
            fa_version=self.version,
            **given,
        )

    def _attend(
        self,
        step: PrefillStep,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        pages: torch.Tensor,
        local: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """One request over its context, put together, and itself."""
        chunk = slice(step.start, step.stop)
        k_context, v_context = self._context(step, pages, local, k)
        if not self.has_flash:
            output[chunk] = prefill_attention(
                q[chunk], k_context, v_context, k[chunk], v[chunk], self.scale
            ).to(output.dtype)
            return
        k_all, v_all = torch.cat([k_context, k[chunk]]), torch.cat([v_context, v[chunk]])
        T, n = step.stop - step.start, len(k_all)
        starts = torch.tensor([[0, T], [0, n]], dtype=torch.int32, device=q.device)
        self._flash(q[chunk], k_all, v_all, output[chunk], starts[0], T, n, cu_seqlens_k=starts[1])

    def _context(
        self, step: PrefillStep, pages: torch.Tensor, local: torch.Tensor, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V before the chunk, each `[C, H, D]`: pages, then raw tokens, the pinned ones first."""
        k_parts: list[torch.Tensor] = []
        v_parts: list[torch.Tensor] = []
        skipped = step.num_skipped
        for ids in step.page.split(PAGES_AT_ONCE):
            for parts, x in zip(
                (k_parts, v_parts), self.codec.reconstruct(pages.index_select(0, ids)), strict=True
            ):
                parts.append(x.flatten(0, 1)[skipped:].to(like.dtype))
            skipped = 0
        for parts, x in zip((k_parts, v_parts), load(local, step.cells), strict=True):
            parts.append(x.to(like.dtype))
        return torch.cat(k_parts), torch.cat(v_parts)
