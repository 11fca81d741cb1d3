"""What pages would do to the model's predictions, found by forward passes alone.

`calibration/statistics.py` prices the change that pages make to a head's output by gradients. An engine has
none, so both parts of the damage are measured apart.

1. How much a dim's bits change the outputs: the same sums, along random directions in place of gradients. The
   mean of (r . change)^2 over r ~ N(0, 1) is |change|^2.
2. What a change is worth: keys, then values, of one layer go through 2-bit pages while all else stays exact.
   The KL divergence over the energy of the change is the price of that layer, in nats.

Damage is price times change. docs/use/recipes.md compares it with gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from fourier_vllm.calibration.statistics import KEY_BITS, VALUE_BITS, LayerStatistics, Sums
from fourier_vllm.engine.measure.forward import Model
from fourier_vllm.engine.measure.ranks import gather, is_first
from fourier_vllm.engine.measure.watch import attend, watched
from fourier_vllm.kernels.basis import rotation
from fourier_vllm.kernels.ranges import range_share
from fourier_vllm.kernels.reference.codecs import dequantize, quantize

SEED = 0
PRICED_BITS = 2  # most dims get them
KINDS = ("keys", "values")


class Layer(NamedTuple):
    """A layer that gets pages, on this worker.

    Attributes
    ----------
    ordinal : int
        Among all layers of the model that get pages.
    heads : range
        Which of the model's KV heads this worker has.
    """

    ordinal: int
    heads: range


class Sizes(NamedTuple):
    """W, m, and the first and last tokens that attention reads raw."""

    page_size: int
    coefficients: int
    sink_tokens: int
    local_window: int


@torch.inference_mode()
def measure(
    model: Model,
    attention: Mapping[str, Any],
    layers: Mapping[str, Layer],
    num_layers: int,
    num_kv_heads: int,
    documents: Sequence[Tensor],
    short: Sequence[Tensor],
    sizes: Sizes,
) -> list[LayerStatistics]:
    """Run the model over texts, on all its workers at once, and measure its layers.

    Parameters
    ----------
    attention : mapping of str to vllm Attention
        All attention layers of this worker, by name.
    layers : mapping of str to Layer
        Those of them that get pages.
    num_layers, num_kv_heads : int
        Layers that get pages, and KV heads of a layer, on all workers together.
    documents : sequence of Tensor [T]
        Token ids; what pages change is measured on these.
    short : sequence of Tensor [t]
        Token ids; what a change is worth is measured on these, three times as often as there are layers.

    Returns
    -------
    list of LayerStatistics
        All layers and all heads, the same on every worker.
    """
    passes = len(documents) + len(short) * (1 + len(KINDS) * num_layers)
    with tqdm(
        total=passes, desc="measure", unit="pass", disable=None if is_first() else True
    ) as bar:
        changes = _changes(model, attention, layers, documents, sizes, bar)
        worth = _worth(model, attention, layers, num_layers, short, sizes, bar)
    found = gather((list(layers.values()), list(changes.values()), worth))
    return [_statistics(i, num_kv_heads, found) for i in range(num_layers)]


def _changes(
    model: Model,
    attention: Mapping[str, Any],
    layers: Mapping[str, Layer],
    documents: Sequence[Tensor],
    sizes: Sizes,
    bar: Any,
) -> dict[str, Sums]:
    """Sums over what pages change, along random directions, for each layer of this worker."""
    sums = {name: Sums(*sizes) for name in layers}
    generator = torch.Generator(model.device).manual_seed(SEED)

    def observe(name: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        if name in layers:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            directions = torch.randn(
                q.shape, generator=generator, device=q.device, dtype=torch.float32
            )
            sums[name].add(q, k, v, attention[name].impl.scale, directions)
        return out

    with watched(attention, observe):
        for ids in documents:
            model.hidden_states(ids)
            bar.update()
    return sums


class Worth(NamedTuple):
    """Sums over the short texts, `[layers, 2]` for keys and values, float64 on the CPU.

    Attributes
    ----------
    nats : Tensor
        KL divergences, from the last stage; zeros elsewhere.
    energy : Tensor
        Squares of what changed in this worker's heads; zeros where another stage has the layer.
    """

    nats: Tensor
    energy: Tensor


def _worth(
    model: Model,
    attention: Mapping[str, Any],
    layers: Mapping[str, Layer],
    num_layers: int,
    short: Sequence[Tensor],
    sizes: Sizes,
    bar: Any,
) -> Worth:
    names = {layer.ordinal: name for name, layer in layers.items()}
    worth = Worth(*torch.zeros(2, num_layers, len(KINDS), dtype=torch.float64))
    chosen: tuple[int, int] | None = None

    def observe(name: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        if chosen is None or name != names.get(chosen[0]):
            return out
        ordinal, kind = chosen
        if KINDS[kind] == "keys":
            k = through_pages(k, sizes, rotate=False)
        else:
            v = through_pages(v, sizes, rotate=True)
        changed = attend(q, k.to(q), v.to(q), attention[name].impl.scale)
        worth.energy[ordinal, kind] += (
            (changed - out).float().square().sum(dtype=torch.float64).cpu()
        )
        return changed

    with watched(attention, observe):
        for ids in short:
            chosen = None
            exact = model.hidden_states(ids)
            bar.update()
            for ordinal in range(num_layers):
                for kind in range(len(KINDS)):
                    chosen = ordinal, kind
                    found = model.hidden_states(ids)
                    if exact is not None and found is not None:
                        worth.nats[ordinal, kind] += model.divergence(exact, found).sum().cpu()
                    bar.update()
    return worth


def through_pages(x: Tensor, sizes: Sizes, rotate: bool) -> Tensor:
    """Whole pages of keys or of rotated values `[T, H, D]` at `PRICED_BITS`, the first tokens raw."""
    sums = Sums(sizes.page_size, sizes.coefficients, sizes.sink_tokens, 0)
    x = x.transpose(0, 1).float()
    if rotate:
        basis = rotation(x.shape[-1]).to(x)
        sealed = x[:, : x.shape[1] // sizes.page_size * sizes.page_size] @ basis
        codes = quantize(sealed, PRICED_BITS, range_share(PRICED_BITS))
        error = (sealed - dequantize(*codes)) @ basis.mT
    else:
        residual = sums._residual(x)
        error = residual - dequantize(*quantize(residual, PRICED_BITS))
        error = error.transpose(2, 3).flatten(1, 2)
    error[:, : sizes.sink_tokens] = 0
    x[:, : error.shape[1]] -= error
    return x.transpose(0, 1)


def _statistics(ordinal: int, num_kv_heads: int, found: Sequence[Any]) -> LayerStatistics:
    """Of one layer, from what all workers found."""
    nats = torch.stack([worth.nats[ordinal] for _, _, worth in found]).max(0).values
    energy = torch.stack([worth.energy[ordinal] for _, _, worth in found]).sum(0)
    keys, values = (2 * nats / energy.clamp_min(1e-30)).tolist()  # sums are halves, as of gradients
    parts = [
        (layer.heads, sums.finish())
        for layers, of_layers, _ in found
        for layer, sums in zip(layers, of_layers, strict=True)
        if layer.ordinal == ordinal
    ]

    def whole(pick: Callable[[LayerStatistics], Tensor], is_summed: bool = True) -> Tensor:
        """All heads of a tensor `[heads, ...]`; workers that share a KV head have queries of their own."""
        one = pick(parts[0][1])
        out = one.new_zeros(num_kv_heads, *one.shape[1:])
        for heads, part in parts:
            its = slice(heads.start, heads.stop)
            out[its] = out[its] + pick(part) if is_summed else pick(part)
        return out

    return LayerStatistics(
        key_damage={b: keys * whole(lambda x, b=b: x.key_damage[b]) for b in KEY_BITS},
        value_damage={b: values * whole(lambda x, b=b: x.value_damage[b]) for b in VALUE_BITS},
        residual=whole(lambda x: x.residual, is_summed=False),
        value_residual=whole(lambda x: x.value_residual, is_summed=False),
    )
