"""What a model's queries, keys and values look like on text: the statistics behind a recipe.

The model runs with an attention function of our own. It sees queries and keys after RoPE, adds to
running sums and hands the work to SDPA, so memory does not grow with the text and any family that
`transformers` runs through its attention interface will do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fourier_vllm.calibration.allocate import DISTORTION
from fourier_vllm.calibration.model import full_attention_layers
from fourier_vllm.kernels.basis import dct_basis
from fourier_vllm.kernels.reference import quantize
from fourier_vllm.recipe import DEFAULT_PAGE_SIZE, DEFAULT_SINK_TOKENS

IMPLEMENTATION = "fourier_collect"
CODED = tuple(bits for bits in DISTORTION if bits)
# Arguments of attention functions that SDPA would silently ignore.
UNSUPPORTED = {"softcap": "attention logit soft caps", "s_aux": "learned attention sinks"}


@dataclass(frozen=True)
class LayerStatistics:
    """Means over the text for one layer of H KV heads of D dims, each float64 `[H, D]` on the CPU.

    Attributes
    ----------
    query : Tensor
        Square of a query dim, over the heads of the group and the later half of each document:
        those are the queries that read far context.
    residual : Tensor
        Square of what a key dim's coefficients miss.
    error : dict of int to Tensor
        Square of what is still missed after codes of that many bits.
    value_residual : Tensor
        Square of what a value dim's coefficients would miss.
    """

    query: Tensor
    residual: Tensor
    error: dict[int, Tensor]
    value_residual: Tensor

    @property
    def weight(self) -> Tensor:
        """Damage of each K dim at 0 bits, what `allocate_bits` takes."""
        return self.query * self.residual


@dataclass
class _Sums:
    """Running sums of one layer."""

    basis: Tensor  # [m, W]
    sink_tokens: int
    queries: int = 0
    tokens: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Take in one document: q `[Hq, T, D]`, k and v `[H, T, D]`."""
        H, T, D = k.shape
        W = self.basis.shape[1]
        late = q[:, T // 2 :].reshape(H, -1, D).float()
        self._add("query", late.square().sum(1, dtype=torch.float64))
        self.queries += late.shape[1]
        self.tokens += T // W * W - self.sink_tokens
        rest = self._residual(k)
        self._add("residual", self._energy(rest))
        for bits in CODED:
            codes, scale, zero = quantize(rest, bits)
            coded = codes * scale.float()[..., None] + zero.float()[..., None]
            self._add(f"error{bits}", self._energy(rest - coded))
        self._add("value_residual", self._energy(self._residual(v)))

    def _residual(self, x: Tensor) -> Tensor:
        """`[H, T, D]` to what the coefficients of its whole pages miss, `[H, P, D, W]`."""
        W, S = self.basis.shape[1], self.sink_tokens
        pages = x[:, : x.shape[1] // W * W].unflatten(1, (-1, W)).transpose(2, 3)
        pages = pages.to(torch.float32, copy=True)
        if S:
            # As `PageCodec.seal` does: attention reads these tokens raw.
            pages[:, 0, :, :S] = pages[:, 0, :, S:].sum(-1, keepdim=True) / max(1, W - S)
        basis = self.basis.to(pages)
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
        means = {
            name: total / (self.queries if name == "query" else self.tokens)
            for name, total in self.sums.items()
        }
        return LayerStatistics(
            query=means["query"],
            residual=means["residual"],
            error={bits: means[f"error{bits}"] for bits in CODED},
            value_residual=means["value_residual"],
        )


@torch.no_grad()
def collect(
    model: Any,
    documents: Sequence[Tensor],
    page_size: int = DEFAULT_PAGE_SIZE,
    coefficients: int = 4,
    sink_tokens: int = DEFAULT_SINK_TOKENS,
) -> list[LayerStatistics]:
    """Run the model over documents and measure its layers with full attention.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal LM.
    documents : sequence of Tensor [T]
        Token ids, each of at least a page and a token.
    page_size, coefficients, sink_tokens : int
        W, m, and the first tokens of a document that attention reads raw.

    Returns
    -------
    list of LayerStatistics
        One per layer with full attention, in order.

    Raises
    ------
    ValueError
        A document is too short, or the model's attention cannot be watched.
    """
    for ids in documents:
        if len(ids) <= page_size:
            raise ValueError(
                f"a document must have more than {page_size} tokens, found {len(ids)}: join some."
            )
    basis = dct_basis(page_size, coefficients)
    layers = {i: _Sums(basis, min(sink_tokens, page_size)) for i in full_attention_layers(model)}
    with (
        tqdm(
            total=len(documents) * len(layers), desc="calibrate", unit="layer", disable=None
        ) as bar,
        _watched(model, layers, bar),
    ):
        for ids in documents:
            # Without the head: logits of a whole document would be the largest tensor.
            model.base_model(input_ids=ids[None].to(model.device), use_cache=False)
    missing = [i for i, layer in layers.items() if not layer.sums]
    if missing or not layers:
        raise ValueError(
            f"model {type(model).__name__} does not run its attention through the interface of"
            " transformers: leave the option `recipe` out, the engine then derives one."
        )
    return [layer.finish() for layer in layers.values()]


def distortion(statistics: Sequence[LayerStatistics]) -> dict[int, float]:
    """Share of the score error that is left at each number of bits, for `allocate_bits`."""
    whole = sum(float(x.weight.sum()) for x in statistics)
    left = {b: sum(float((x.query * x.error[b]).sum()) for x in statistics) for b in CODED}
    return {0: 1.0} | {b: left[b] / max(whole, 1e-30) for b in CODED}


@contextmanager
def _watched(model: Any, layers: Mapping[int, _Sums], bar: Any) -> Iterator[None]:
    """Let the layers of `model` add to their sums."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        for name, feature in UNSUPPORTED.items():
            if options.get(name) is not None:
                raise ValueError(f"{feature} are not supported: choose another model.")
        layer = layers.get(getattr(module, "layer_idx", -1))
        if layer is not None:
            layer.add(query[0], key[0], value[0])
            bar.update()
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
