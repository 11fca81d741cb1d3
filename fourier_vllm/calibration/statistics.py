"""What pages would do to one attention layer, measured on its queries, keys, values and gradients.

A key that is off by e_t changes the scores of a query q by q . e_t / sqrt(D) and, to first order, the
output o of its head by sum_t p_t (q . e_t) (v_t - o) / sqrt(D), for attention weights p and values v. A
value that is off by e_t changes it by sum_t p_t e_t.

What a change of o is worth to the model, the gradient g of the log-likelihood of a token drawn from the
model's own predictions tells: half the mean of (g . change)^2 is the KL divergence to the exact model
(Fisher information). So the damage of dim d of the keys, in nats a token, is

    1/2 E[ ( sum_t p_t g . (v_t - o) q_d e_td / sqrt(D) )^2 ]

and of the values 1/2 E[ ( sum_t p_t g . e_t )^2 ]. The sums are taken before the square: errors of
neighbouring tokens are alike, and treating them as independent costs three times the KL on SmolLM2.
Damages of different layers compare, so one budget can be spent over all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fourier_vllm.kernels.basis import dct_basis, rotation
from fourier_vllm.kernels.ranges import range_share
from fourier_vllm.kernels.reference.codecs import dequantize, quantize
from fourier_vllm.window import pages_before

# Queries of each document that are followed; more of them change little and cost attention weights.
MAX_QUERIES = 128
KEY_BITS = (0, 2, 4, 8)
VALUE_BITS = (0, 2, 3, 4, 8)


@dataclass(frozen=True)
class LayerStatistics:
    """Means over a text for one layer of H KV heads of D dims, float64 on the CPU.

    Attributes
    ----------
    key_damage : dict of int to Tensor [H, D]
        Damage of each K dim at 0, 2, 4 and 8 bits, nats a token.
    value_damage : dict of int to Tensor [H]
        Damage of each head's values at 0 (spectral coefficients only), 2, 3, 4 and 8 bits.
    residual, value_residual : Tensor [H, D]
        Mean square of what the coefficients of a key and of a value dim miss, over sealed tokens.
    """

    key_damage: dict[int, Tensor]
    value_damage: dict[int, Tensor]
    residual: Tensor
    value_residual: Tensor


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
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, q: Tensor, k: Tensor, v: Tensor, scaling: float, gradient: Tensor) -> None:
        """Take in one document.

        Parameters
        ----------
        q, gradient : Tensor [Hq, T, D]
            Queries after RoPE, and the gradient at the output of their heads.
        k, v : Tensor [H, T, D]
            Keys after RoPE, and values.
        scaling : float
            Of the scores.
        """
        H, T, D = k.shape
        k, v = k.float(), v.float()
        position = torch.arange(T // 2, T, -(-(T // 2) // MAX_QUERIES), device=k.device)
        late = q[:, position].float().view(H, -1, len(position), D)  # [H, G, n, D]
        g = gradient[:, position].float().view_as(late)
        p = self._weights(late, k, position, scaling)  # [H, G, n, T]
        g_v = g @ v.mT[:, None]
        toward = g_v - (p * g_v).sum(-1, keepdim=True)  # g . (v_t - o)
        p *= from_pages(position, T, self.page_size, self.local_window, self.sink_tokens)
        keys, values = self._residual(self._stored(k)), self._residual(v)  # [H, P, D, W]
        sealed = keys.shape[1] * self.page_size
        self._add("tokens", torch.tensor(sealed - self.sink_tokens))
        self._add("queries", torch.tensor(len(position)))
        self._add("residual", self._energy(keys))
        self._add("value_residual", self._energy(values))
        reads = (p * toward)[..., :sealed] * scaling
        for bits in KEY_BITS:
            error = keys if bits == 0 else keys - dequantize(*quantize(keys, bits))
            change = self._key_change(late, reads, _by_token(error)[:, None])
            self._add(f"key{bits}", change.square().sum((1, 2), dtype=torch.float64))
        basis = rotation(D).to(v)
        rotated = v[:, :sealed] @ basis  # [H, T, D]
        for bits in VALUE_BITS:
            if bits == 0:
                error, seen = _by_token(values), g
            else:
                codes = quantize(rotated, bits, range_share(bits))
                error, seen = rotated - dequantize(*codes), g @ basis
            change = (seen * (p[..., :sealed] @ error[:, None])).sum(-1)
            self._add(f"value{bits}", change.square().sum((1, 2), dtype=torch.float64))

    def _stored(self, k: Tensor) -> Tensor:
        """What pages hold of keys after RoPE; `benchmarks/sweep.py` tries another."""
        return k

    def _key_change(self, q: Tensor, reads: Tensor, error: Tensor) -> Tensor:
        """`[H, G, n, D]` of `q`, of `reads [H, G, n, t]` and of an `error [H, 1, t, D]` of the keys."""
        return q * (reads @ error)

    def _weights(self, q: Tensor, k: Tensor, position: Tensor, scaling: float) -> Tensor:
        scores = q @ k.mT[:, None] * scaling
        later = torch.arange(k.shape[1], device=k.device) > position[:, None]
        return scores.masked_fill_(later, -torch.inf).softmax(-1)

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
        queries, tokens = 2 * self.sums["queries"], self.sums["tokens"]
        return LayerStatistics(
            key_damage={b: self.sums[f"key{b}"] / queries for b in KEY_BITS},
            value_damage={b: self.sums[f"value{b}"] / queries for b in VALUE_BITS},
            residual=self.sums["residual"] / tokens,
            value_residual=self.sums["value_residual"] / tokens,
        )


def _by_token(pages: Tensor) -> Tensor:
    """`[H, P, D, W]` to `[H, P * W, D]`."""
    return pages.transpose(2, 3).flatten(1, 2)


def from_pages(
    position: Tensor, tokens: int, page_size: int, local_window: int, sink_tokens: int
) -> Tensor:
    """Which of a document's first `tokens` the queries at `position [n]` read from pages, `[n, T]` bool."""
    token = torch.arange(tokens, device=position.device)
    # A document shorter than the local window still has to say which dims matter.
    window = min(local_window, tokens // 4)
    sealed = pages_before(position + 1, window, page_size) * page_size
    return (token >= sink_tokens) & (token < sealed[:, None])
