"""Attention of prompts on a GPU: exact inside the chunk, older tokens from pages and the local cache.

Keys and values before the chunk are laid out in scratch, token after token, and attended like any prompt's:
what that costs grows with the context, what attention costs with the context times the chunk.
"""

from __future__ import annotations

import torch

from fourier_vllm.engine.gpu.plan import GpuPlan
from fourier_vllm.engine.gpu.prompt_attention import PromptAttention
from fourier_vllm.kernels.gpu.step import Layer
from fourier_vllm.kernels.gpu.tables import Tables
from fourier_vllm.kernels.gpu.unseal import unseal
from fourier_vllm.page import align
from fourier_vllm.window import Window

KEYS_AT_ONCE = 32768  # laid out together: bounds the scratch


class Prefill:
    """Prefill attention of one layer.

    Parameters
    ----------
    max_model_len, max_num_tokens : int
        Tokens of a request, and of a step, at most.
    """

    def __init__(
        self,
        tables: Tables,
        window: Window,
        attention: PromptAttention,
        num_heads: int,
        dtype: torch.dtype,
        max_model_len: int,
        max_num_tokens: int,
    ) -> None:
        self.tables, self.window, self.attention = tables, window, attention
        self.num_heads, self.dtype, self.max_num_tokens = num_heads, dtype, max_num_tokens
        W = window.page_size
        keys = KEYS_AT_ONCE if attention.can_split else max(KEYS_AT_ONCE, max_model_len)
        self.capacity = align(max(keys, max_num_tokens + W), W)
        self.can_overflow = max_model_len > self.capacity

    def scratch(self) -> list[torch.Tensor]:
        """Keys, values and an output that is added to another, from vLLM's workspace."""
        from vllm.v1.worker.workspace import current_workspace_manager

        layout = self.tables.layout
        H, D = layout.num_kv_heads, layout.head_size
        T = self.max_num_tokens if self.can_overflow else 0
        return current_workspace_manager().get_simultaneous(
            ((self.capacity, H, D), self.dtype),
            ((self.capacity, H, D), self.dtype),
            ((T, self.num_heads, D), self.dtype),
        )

    def prepare(self) -> None:
        """Hold for a moment what a prompt needs at most, for vLLM's memory profile."""
        k, _, _ = self.scratch()
        q = k.new_empty(self.max_num_tokens, self.num_heads, k.shape[2], device="meta")
        k.new_empty(self.attention.memory(q, k), dtype=torch.uint8)

    def run(
        self,
        layer: Layer,
        plan: GpuPlan,
        q: torch.Tensor,
        k_new: torch.Tensor,
        v_new: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Write `output [T, Hq, D]` of the requests after the first `plan.num_decodes`."""
        # In flight they lie token after token already.
        scratch = [] if plan.in_flight else self.scratch()
        lse: torch.Tensor | None = None
        for piece in plan.pieces:
            rows, n = piece.queries, sum(piece.key_lens)
            q_p, out = _rows(q, rows), _rows(output, rows)
            if not scratch:
                k, v = _rows(k_new, rows), _rows(v_new, rows)
            else:
                k, v = (x[:n] for x in scratch[:2])
                unseal(
                    layer,
                    plan.step,
                    k_new,
                    v_new,
                    piece.first_row,
                    piece.begin,
                    max(piece.key_lens),
                    piece.key_starts,
                    k,
                    v,
                )
            if lse is None:
                lse = self.attention(piece, q_p, k, v, out)
            else:
                more = scratch[2][: rows.stop - rows.start]
                more_lse = self.attention(piece, q_p, k, v, more)
                lse = self._add(out, lse, more, more_lse)
            if piece.is_last:
                lse = None

    def _add(
        self, out: torch.Tensor, lse: torch.Tensor, more: torch.Tensor, more_lse: torch.Tensor
    ) -> torch.Tensor:
        """Add attention over more keys to `out`; returns log-sum-exps over all."""
        from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

        total = torch.empty_like(lse)
        merge_attn_states(out, out, lse, more, more_lse, total)
        return total


def _rows(x: torch.Tensor, rows: slice) -> torch.Tensor:
    """`x[rows]`; most prompts come alone, and the host has no time to spare for views of all of it."""
    return x if rows.stop - rows.start == x.shape[0] else x[rows]
