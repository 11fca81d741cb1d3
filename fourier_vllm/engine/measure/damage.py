"""What pages would do to the model's predictions, found by forward passes alone.

`calibration/statistics.py` prices the change that pages make to a head's output by gradients. An engine has
none, so both parts of the damage are measured apart.

1. How much a dim's bits change the outputs: the same sums, along random directions in place of gradients. The
   mean of (r . change)^2 over r ~ N(0, 1) is |change|^2.
2. What a change is worth: keys, then values, of one layer go through 2-bit pages while all else stays exact.
   Queries read the last tokens raw, as they do in serving: a first layer that looks at its neighbours would
   else seem 4 to 16 times dearer than it is (Qwen2.5-0.5B). The KL divergence over the energy of the change
   is the price of that layer, in nats. A model in 16 bits rounds its activations, and any change, however
   small, rounds them anew: that alone is .001 nats a token (SmolLM2), ten times what 2-bit pages do to most
   layers, and .016 where activations have 8 bits. So the change of the layer's output is enlarged until its
   KL stands out (`NATS`, `ABOVE_ROUNDING`).

Damage is price times change. Values at 0 bits lose all but their spectral coefficients. That change is large
and has a direction, so its price is `ALL_LOST` times that of 2 bits.
docs/use/recipes.md compares the method with gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from itertools import product
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fourier_vllm._text import SUBJECT
from fourier_vllm.calibration.statistics import (
    KEY_BITS,
    VALUE_BITS,
    LayerStatistics,
    Sums,
    from_pages,
)
from fourier_vllm.engine.measure.forward import Model
from fourier_vllm.engine.measure.progress import Done, progress
from fourier_vllm.engine.measure.ranks import gather, query_heads
from fourier_vllm.engine.measure.watch import change_by_pages, watched
from fourier_vllm.kernels.reference.codec import PageCodec, through_pages
from fourier_vllm.page import PageLayout

PRICED_BITS = 2  # most dims get them
KINDS = ("keys", "values")
# Their KL is 1 to 5 times what the price of 2 bits says (Qwen2.5-0.5B, but its first layer).
ALL_LOST = 6
NATS = (0.015, 0.08)  # a token: KL still grows with the square of the change
ABOVE_ROUNDING = 4  # times what rounding alone gives: the least KL that a price is taken from
ROUNDING = 2**-8  # of a number: the least change that bfloat16 notices
FACTORS = (1, 256)  # by which a change is enlarged
FIRST_FACTOR = 8
TRIES = 4


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


class Texts(NamedTuple):
    """Token ids.

    Attributes
    ----------
    documents : list of Tensor [T]
        What pages change is measured on these.
    medley : Tensor [t]
        What a change is worth is measured on this, in two passes a layer.
    """

    documents: list[Tensor]
    medley: Tensor


class Watched(NamedTuple):
    """The attention of a model on this worker.

    Attributes
    ----------
    attention : mapping of str to vllm Attention
        All attention layers, by name.
    layers : mapping of str to Layer
        Those of them that get pages.
    num_layers, num_kv_heads : int
        Layers that get pages, and KV heads of a layer, on all workers together.
    """

    attention: Mapping[str, Any]
    layers: Mapping[str, Layer]
    num_layers: int
    num_kv_heads: int


@torch.inference_mode()
def measure(model: Model, of: Watched, texts: Texts, sizes: Sizes) -> list[LayerStatistics]:
    """Run the model over texts, on all its workers at once, and measure its layers.

    Returns
    -------
    list of LayerStatistics
        All layers and all heads, the same on every worker.

    Raises
    ------
    ValueError
        The model's activations overflow, on all workers at once; in one sentence with the way out.
    """
    passes = 2 + len(KINDS) * of.num_layers
    with progress(sum(map(len, texts.documents)) + passes * len(texts.medley)) as done:
        changes = _changes(model, of, texts.documents, sizes, done)
        worth = _worth(model, of, texts.medley, sizes, done)
    found = gather(_Found(list(of.layers.values()), list(changes.values()), worth))
    return [_statistics(i, of.num_kv_heads, found) for i in range(of.num_layers)]


def _changes(
    model: Model, of: Watched, documents: Sequence[Tensor], sizes: Sizes, done: Done
) -> dict[str, Sums]:
    """Sums over what pages change, along random directions, for each layer of this worker."""
    sums = {name: Sums(*sizes) for name in of.layers}
    generator = torch.Generator(model.device)
    document = 0

    def directions(ordinal: int, q: Tensor) -> Tensor:
        """As `q [Hq, T, D]`, the same for a head whichever worker has it."""
        drawn = torch.empty(q.shape, device=q.device)
        for head, of_head in zip(query_heads(len(q)), drawn, strict=True):
            key = sha256(repr((document, ordinal, head)).encode()).digest()
            of_head.normal_(generator=generator.manual_seed(int.from_bytes(key[:7], "big")))
        return drawn

    def observe(name: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        if name in of.layers:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            drawn = directions(of.layers[name].ordinal, q)
            sums[name].add(q, k, v, of.attention[name].impl.scale, drawn)
        return out

    with watched(of.attention, observe):
        for ids in documents:
            model.hidden_states(ids)
            done(len(ids))
            document += 1
    return sums


class _Worth(NamedTuple):
    """Sums over the medley, `[layers, 2]` for keys and values, float64 on the CPU.

    Attributes
    ----------
    nats : Tensor
        KL divergences, the same on all workers.
    energy : Tensor
        Squares of what changed in this worker's heads; zeros where another stage has the layer.
    """

    nats: Tensor
    energy: Tensor


def _worth(model: Model, of: Watched, medley: Tensor, sizes: Sizes, done: Done) -> _Worth:
    worth = _Worth(*torch.zeros(2, of.num_layers, len(KINDS), dtype=torch.float64))
    tokens = len(medley)
    position = torch.arange(tokens, device=model.device)
    window = sizes.page_size, sizes.local_window, sizes.sink_tokens
    read = from_pages(position, tokens, *window)
    chosen: tuple[int, int] | None = None  # layer and kind that go through pages
    is_rounded = False
    factors: dict[int, float] = dict.fromkeys(range(len(KINDS)), FIRST_FACTOR)

    def observe(name: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        if is_rounded and name in of.layers and of.layers[name].ordinal == 0:
            return _rounded(out, read.any(1))
        if chosen is None or name not in of.layers or of.layers[name].ordinal != chosen[0]:
            return out
        paged = _two_bit_pages(k, v, sizes)
        paged = (paged[0], v) if KINDS[chosen[1]] == "keys" else (k, paged[1])
        change = change_by_pages(q, (k, v), paged, read, of.attention[name].impl.scale)
        change *= factors[chosen[1]]
        worth.energy[chosen] = change.square().sum(dtype=torch.float64).cpu()
        return out.float() + change

    def nats_a_token(exact: Tensor | None) -> float:
        """KL of a pass over the medley, on all workers."""
        found, nats = model.hidden_states(medley), 0.0
        if exact is not None and found is not None:
            nats = model.divergence(exact, found)
        return max(gather(nats)) / tokens

    with watched(of.attention, observe):
        exact = model.hidden_states(medley)
        done(tokens)
        is_rounded = True
        band = _band(nats_a_token(exact))
        is_rounded = False
        done(tokens)
        for chosen in product(range(of.num_layers), range(len(KINDS))):
            # The factor of a layer is the first guess for the next one.
            for _ in range(TRIES):
                nats = nats_a_token(exact)
                worth.nats[chosen] = nats * tokens
                better = _factor(factors[chosen[1]], nats, band)
                if better is None:
                    break
                factors[chosen[1]] = better
            if nats == math.inf:
                kind = KINDS[chosen[1]]
                raise ValueError(
                    f"{SUBJECT} cannot measure this model: its activations overflow once the {kind} of"
                    f" layer {chosen[0]} have 2 bits; name a recipe, or set recipe to weights."
                )
            done(tokens)
    return worth


def _rounded(out: Tensor, rows: Tensor) -> Tensor:
    """`out [T, Hq, D]`, in `rows [T]` off by as little as rounds everything behind it anew."""
    sign = 1 - 2 * (torch.arange(out[0].numel(), device=out.device) % 2).view(out.shape[1:])
    return out.float() * (1 + ROUNDING * sign * rows[:, None, None])


def _band(rounding: float) -> tuple[float, float]:
    """Nats a token that a price is taken from, where rounding alone gives `rounding`."""
    low, high = NATS
    raised = max(1.0, ABOVE_ROUNDING * rounding / low)
    return low * raised, high * raised


def _factor(factor: float, nats: float, band: tuple[float, float]) -> float | None:
    """What to enlarge a change by instead of `factor`, which gave `nats` a token; None if that will do."""
    low, high = band
    if low <= nats <= high:
        return None
    wanted = factor * math.sqrt(math.sqrt(low * high) / max(nats, low / 1000))
    wanted = min(max(wanted, FACTORS[0]), FACTORS[1])
    return wanted if wanted != factor else None


def _two_bit_pages(k: Tensor, v: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """What whole pages make of `k` and `v [T, H, D]`."""
    _, H, D = k.shape
    layout = PageLayout.build(
        [[PRICED_BITS] * D] * H,
        PRICED_BITS,
        head_size=D,
        page_size=sizes.page_size,
        coefficients=sizes.coefficients,
        coefficient_bits=8,
        itemsize=k.dtype.itemsize,
    )
    codec = PageCodec(layout, k.dtype, k.device)
    paged = through_pages(codec, k.transpose(0, 1), v.transpose(0, 1), sizes.sink_tokens)
    k, v = (x.transpose(0, 1) for x in paged)
    return k, v


class _Found(NamedTuple):
    """What one worker measured; `layers` and `changes` belong together."""

    layers: list[Layer]
    changes: list[Sums]
    worth: _Worth


def _statistics(ordinal: int, num_kv_heads: int, found: Sequence[_Found]) -> LayerStatistics:
    """Of one layer, from what all workers found."""
    nats = torch.stack([x.worth.nats[ordinal] for x in found]).amax(0)
    energy = torch.stack([x.worth.energy[ordinal] for x in found]).sum(0)
    # The sums are halves, as they are of gradients.
    of_keys, of_values = (2 * nats / energy.clamp_min(torch.finfo().tiny)).tolist()
    parts = [
        (layer.heads, change.finish())
        for x in found
        for layer, change in zip(x.layers, x.changes, strict=True)
        if layer.ordinal == ordinal
    ]

    def whole(pick: Callable[[LayerStatistics], Tensor], is_damage: bool = False) -> Tensor:
        """All heads of a tensor `[heads, ...]`."""
        out = torch.zeros(num_kv_heads, *pick(parts[0][1]).shape[1:], dtype=torch.float64)
        for heads, part in parts:
            its = slice(heads.start, heads.stop)
            # Workers that share a KV head have queries of their own.
            out[its] = out[its] + pick(part) if is_damage else pick(part)
        return out

    def damages(name: str, options: Sequence[int], price: float) -> dict[int, Tensor]:
        def pick(bits: int) -> Callable[[LayerStatistics], Tensor]:
            return lambda layer: getattr(layer, name)[bits]

        return {bits: price * whole(pick(bits), is_damage=True) for bits in options}

    value_damage = damages("value_damage", VALUE_BITS, of_values)
    value_damage[0] *= ALL_LOST
    return LayerStatistics(
        key_damage=damages("key_damage", KEY_BITS, of_keys),
        value_damage=value_damage,
        residual=whole(attrgetter("residual")),
        value_residual=whole(attrgetter("value_residual")),
    )
