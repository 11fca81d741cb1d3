"""Attention of prompts over keys and values that lie token after token, by whoever has kernels for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache

import torch
from vllm.logger import init_logger

from fourier_vllm._text import SUBJECT
from fourier_vllm.engine.gpu.plan import Piece

logger = init_logger("vllm.fourier_vllm")

# Sides of a tile of PyTorch's scores.
QUERY_TILE = 256
KEY_TILE = 1024


class PromptAttention(ABC):
    """Attends the requests of a piece.

    Attributes
    ----------
    scale : float
        Of the scores.
    can_split : bool
        Can attend stretches of the keys, and say how much weight they have.
    """

    can_split = False

    def __init__(self, scale: float) -> None:
        self.scale = scale

    @abstractmethod
    def memory(self, q: torch.Tensor, k: torch.Tensor) -> int:
        """Bytes that a call with `q [T, Hq, D]` and `k [K, H, D]` allocates for itself, at most."""

    @abstractmethod
    def __call__(
        self, piece: Piece, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        """Write `out [T, Hq, D]` of `q [T, Hq, D]` over `k, v [K, H, D]`.

        Returns
        -------
        torch.Tensor
            Natural log-sum-exps `[Hq, T]` float32; empty unless `can_split`.
        """


class FlashAttention(PromptAttention):
    """FlashAttention as vLLM ships it."""

    can_split = True

    def __init__(self, scale: float, version: int) -> None:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        super().__init__(scale)
        self.version, self.attend = version, flash_attn_varlen_func

    def memory(self, q: torch.Tensor, k: torch.Tensor) -> int:
        # Log-sum-exps of all stretches so far, of the next one, and of both.
        return 3 * 4 * q.shape[0] * q.shape[1]

    def __call__(
        self, piece: Piece, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        _, lse, *_ = self.attend(
            q=q,
            k=k,
            v=v,
            out=out,
            cu_seqlens_q=piece.query_starts,
            cu_seqlens_k=piece.key_starts,
            max_seqlen_q=max(piece.query_lens),
            max_seqlen_k=max(piece.key_lens),
            softmax_scale=self.scale,
            causal=piece.is_last,
            fa_version=self.version,
            return_softmax_lse=True,
        )
        return lse


class Xformers(PromptAttention):
    """xformers' memory-efficient attention under a block-diagonal causal mask."""

    def memory(self, q: torch.Tensor, k: torch.Tensor) -> int:
        T, Hq, D = q.shape
        K, H, _ = k.shape
        # The output, and K and V with a head for every query head.
        return q.itemsize * D * Hq * (T + (2 * K if Hq > H else 0))

    def __call__(
        self, piece: Piece, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        from xformers.ops import memory_efficient_attention
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask

        mask = BlockDiagonalCausalFromBottomRightMask.from_seqlens(
            piece.query_lens, piece.key_lens, device=q.device
        )
        H = k.shape[1]
        q = q.unflatten(1, (H, -1))
        k, v = (x[:, :, None].expand(-1, -1, q.shape[2], -1) for x in (k, v))
        made = memory_efficient_attention(
            *(x[None].flatten(2, 3) for x in (q, k, v)), attn_bias=mask, scale=self.scale
        )
        out.copy_(made[0])
        return q.new_empty(0)


class TorchAttention(PromptAttention):
    """PyTorch's matrix products in float32, request by request and in tiles of the scores.

    PyTorch's own attention would expand K and V to all query heads and hold all scores of a query at once,
    depending on the kernel it picks.
    """

    def memory(self, q: torch.Tensor, k: torch.Tensor) -> int:
        _, Hq, D = q.shape
        rows = Hq * QUERY_TILE
        # Scores before and after the softmax; queries, and outputs before and after a tile is added;
        # K and V of a tile, as they are read and as the product wants them.
        numbers = 2 * rows * KEY_TILE + 5 * rows * D + 4 * k.shape[1] * KEY_TILE * D
        return 4 * numbers + QUERY_TILE * KEY_TILE

    def __call__(
        self, piece: Piece, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> torch.Tensor:
        parts = zip(
            q.split(piece.query_lens),
            k.split(piece.key_lens),
            v.split(piece.key_lens),
            out.split(piece.query_lens),
            strict=True,
        )
        for q_b, k_b, v_b, out_b in parts:
            context = len(k_b) - len(q_b)
            for begin in range(0, len(q_b), QUERY_TILE):
                rows = slice(begin, begin + QUERY_TILE)
                end = min(context + rows.stop, len(k_b))
                out_b[rows] = self._attend(q_b[rows], k_b[:end], v_b[:end])
        return q.new_empty(0)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """`[n, Hq, D]` float32 of the last n tokens `q [n, Hq, D]` over `k, v [K, H, D]`."""
        n, K, H = q.shape[0], *k.shape[:2]
        # Rows of a KV head's products are its G query heads' queries: [H, G n, D].
        x = (q.float() * self.scale).unflatten(1, (H, -1)).permute(1, 2, 0, 3).flatten(1, 2)
        most = x.new_full((*x.shape[:2], 1), -torch.inf)
        total, acc = torch.zeros_like(most), torch.zeros_like(x)
        for begin in range(0, K, KEY_TILE):
            k_t, v_t = (y[begin : begin + KEY_TILE].transpose(0, 1).float() for y in (k, v))
            s = x @ k_t.transpose(1, 2)
            first = K - n - begin + 1  # key of the tile that the first query does not see
            if first < k_t.shape[1]:
                hidden = torch.ones(n, k_t.shape[1], dtype=torch.bool, device=q.device)
                s.unflatten(1, (-1, n)).masked_fill_(hidden.triu_(first), -torch.inf)
            new = torch.maximum(most, s.amax(-1, keepdim=True))
            shrink = (most - new).exp_()
            p = s.sub_(new).exp_()
            total = total * shrink + p.sum(-1, keepdim=True)
            acc = torch.baddbmm(acc.mul_(shrink), p, v_t)
            most = new
        return acc.div_(total).unflatten(1, (-1, n)).permute(2, 0, 1, 3).flatten(1, 2)


def flash_attention_version(head_size: int, dtype: torch.dtype) -> int | None:
    """The FlashAttention that vLLM would use here, None where it has none."""
    from vllm.v1.attention.backends.fa_utils import (
        get_flash_attn_version,
        is_flash_attn_varlen_func_available,
    )

    if dtype not in (torch.float16, torch.bfloat16) or not is_flash_attn_varlen_func_available():
        return None
    return get_flash_attn_version(head_size=head_size)


@cache
def xformers_problem(head_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why xformers' attention does not run here; a build for another torch imports and has no kernels."""
    try:
        import xformers.ops  # noqa: F401
    except ImportError:
        return "cannot be imported"
    x = torch.zeros(1, 1, head_size, dtype=dtype, device=device)
    try:
        Xformers(1.0)(Piece(0, slice(0, 1), [1], [1]), x, x, x, torch.empty_like(x))
    except NotImplementedError:
        return f"has no kernels for this GPU, this torch, {dtype} and heads of {head_size}"
    return None


def choose(
    name: str, head_size: int, dtype: torch.dtype, scale: float, device: torch.device
) -> PromptAttention:
    """The implementation that option `prompt_attention` names, or the best there is.

    Raises
    ------
    ValueError
        It is not available here.
    """
    if name == "torch":
        return TorchAttention(scale)
    version = flash_attention_version(head_size, dtype) if name in ("auto", "flash") else None
    if version is not None:
        return FlashAttention(scale, version)
    if name == "flash":
        raise ValueError(
            f"{SUBJECT} has no FlashAttention for this GPU, {dtype} and heads of {head_size}: leave out "
            "the option prompt_attention."
        )
    problem = xformers_problem(head_size, dtype, device)
    if problem is None:
        logger.info_once("fourier: prompts use xformers' attention.")
        return Xformers(scale)
    if name == "xformers":
        raise ValueError(
            f"{SUBJECT} needs xformers for the option prompt_attention, which {problem}: install the "
            "fourier-vllm[xformers] that fits this torch, or leave the option out."
        )
    logger.warning_once(
        "fourier: no FlashAttention for this GPU or dtype, and xformers %s; prompts use PyTorch's "
        "attention.",
        problem,
    )
    return TorchAttention(scale)
