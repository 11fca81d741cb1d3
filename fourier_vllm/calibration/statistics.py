"""What pages would do to one attention layer, measured on its queries, keys and values.

A key that is off by e_t changes the scores of a query q by q . e_t / sqrt(D) and, to first order,
the output of its head by

    sum_t p_t (q . e_t) (v_t - o) / sqrt(D)

for attention weights p, values v and output o. Errors of different tokens and dims are as good as
independent, so dim d alone costs

    sum_t p_t^2 |v_t - o|^2 q_d^2 e_td^2 / D

in expectation: that is the damage of leaving the dim at some number of bits. Mean q_d^2 times mean
e_d^2 would not see who reads which token: on SmolLM2 its recipe has 1.3 times the held-out KL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fourier_vllm.calibration.allocate import DISTORTION
from fourier_vllm.kernels.basis import dct_basis
from fourier_vllm.kernels.reference import quantize

# Queries of each document that are followed; more of them change little and cost attention weights.
MAX_QUERIES = 128
CODED = tuple(bits for bits in DISTORTION if bits)


@dataclass(frozen=True)
class LayerStatistics:
    """Means over a text for one layer of H KV heads of D dims, each float64 `[H, D]` on the CPU.

    Attributes
    ----------
    damage : dict of int to Tensor
        Squared change of a head's output for each K dim at 0, 2, 4 and 8 bits, over queries of the
        later half of each document and the query heads of the group.
    residual, value_residual : Tensor
        Square of what the coefficients of a key and of a value dim miss, over sealed tokens.
    """

    damage: dict[int, Tensor]
    residual: Tensor
    value_residual: Tensor

    @property
    def weight(self) -> Tensor:
        """Damage of each K dim at 0 bits, what `allocate_bits` takes."""
        return self.damage[0]


def distortion(statistics: Sequence[LayerStatistics]) -> dict[int, float]:
    """Share of the damage that is left at each number of bits, for `allocate_bits`."""
    total = {b: sum(float(x.damage[b].sum()) for x in statistics) for b in (0, *CODED)}
    return {b: 1.0 if b == 0 else total[b] / max(total[0], 1e-30) for b in total}


@dataclass
class Sums:
    """Running sums of one layer.

    Attributes
    ----------
    page_size, coefficients, sink_tokens, local_window : int
        W, m, and the first and last tokens that attention reads raw.
    """

    page_size: int
    coefficients: int
    sink_tokens: int
    local_window: int
    queries: int = 0
    tokens: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> None:
        """Take in one document: q `[Hq, T, D]`, k and v `[H, T, D]`, after RoPE."""
        H, T, D = k.shape
        position = torch.arange(T // 2, T, -(-(T // 2) // MAX_QUERIES), device=k.device)
        late = q[:, position].float().view(H, -1, len(position), D)  # [H, G, n, D]
        reads = self._sensitivity(late, k.float(), v.float(), position, scaling)
        self.queries += late[0, ..., 0].numel()
        rest = self._residual(k)
        self.tokens += rest.shape[1] * self.page_size - self.sink_tokens
        self._add("residual", self._energy(rest))
        self._add("value_residual", self._energy(self._residual(v)))
        for bits in (0, *CODED):
            error = rest
            if bits:
                codes, scale, zero = quantize(rest, bits)
                error = rest - codes * scale.float()[..., None] - zero.float()[..., None]
            squares = error.square().transpose(2, 3).flatten(1, 2)  # [H, P * W, D]
            seen = late.square() * (reads[..., : squares.shape[1]] @ squares[:, None])
            self._add(f"damage{bits}", seen.sum((1, 2), dtype=torch.float64))

    def _sensitivity(
        self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, scaling: float
    ) -> Tensor:
        """p^2 |v - o|^2 / D `[H, G, n, T]` of the tokens that a query reads from pages, else 0."""
        token = torch.arange(k.shape[1], device=k.device)
        scores = q @ k.mT[:, None] * scaling
        p = scores.masked_fill_(token > position[:, None], -torch.inf).softmax(-1)
        o = p @ v[:, None]
        distance = (
            v.square().sum(-1)[:, None, None]
            - 2 * (o @ v.mT[:, None])
            + o.square().sum(-1, keepdim=True)
        )
        # A document shorter than the local window still has to say which dims matter.
        window = min(self.local_window, k.shape[1] // 4)
        sealed = (position + 1 - window) // self.page_size * self.page_size
        paged = (token >= self.sink_tokens) & (token < sealed[:, None])
        return p.square_() * distance.clamp_min_(0) * (paged * scaling**2)

    def _residual(self, x: Tensor) -> Tensor:
        """`[H, T, D]` to what the coefficients of its whole pages miss, `[H, P, D, W]`."""
        W, S = self.page_size, self.sink_tokens
        pages = x[:, : x.shape[1] // W * W].unflatten(1, (-1, W)).transpose(2, 3)
        pages = pages.to(torch.float32, copy=True)
        # As `PageCodec.seal` does: attention reads these tokens raw.
        pages[:, 0, :, :S] = pages[:, 0, :, S:].sum(-1, keepdim=True) / max(1, W - S)
        basis = dct_basis(W, self.coefficients).to(pages)
        return pages - pages @ basis.T @ basis

    def _energy(self, pages: Tensor) -> Tensor:
        """Sum `[H, D]` of squares over the tokens that are read from pages `[H, P, D, W]`."""
        squares = pages.square()
        squares[:, 0, :, : self.sink_tokens] = 0
        return squares.sum((1, 3), dtype=torch.float64)

    def _add(self, name: str, value: Tensor) -> None:
        value = value.cpu()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def finish(self) -> LayerStatistics:
        """The means."""
        return LayerStatistics(
            damage={b: self.sums[f"damage{b}"] / self.queries for b in (0, *CODED)},
            residual=self.sums["residual"] / self.tokens,
            value_residual=self.sums["value_residual"] / self.tokens,
        )
