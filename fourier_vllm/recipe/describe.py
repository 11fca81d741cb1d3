"""`fourier-vllm inspect`: what a recipe keeps of each layer and what that takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fourier_vllm.page import PageLayout
from fourier_vllm.recipe import Recipe

ITEM_BYTES = 2
HEADER = ("layer", "K dims x bits", "V bits", "bytes/token", "ratio")


def layouts(recipe: Recipe) -> list[PageLayout]:
    """Pages of each layer, all KV heads on one rank, for a 16-bit model."""
    return [
        PageLayout.build(
            layer.k,
            layer.v,
            head_size=recipe.model.head_size,
            page_size=recipe.page_size,
            coefficients=recipe.coefficients,
            coefficient_bits=recipe.coefficient_bits,
            itemsize=ITEM_BYTES,
        )
        for layer in recipe.layers
    ]


def ratio_of(recipe: Recipe) -> float:
    """Raw bytes over page bytes, all layers together."""
    pages = layouts(recipe)
    return sum(page.raw_bytes for page in pages) / sum(page.page_bytes for page in pages)


def describe(recipe: Recipe) -> str:
    """A table of the layers, the totals, and where the recipe comes from."""
    model, W, pages = recipe.model, recipe.page_size, layouts(recipe)
    rows = [
        (
            str(i),
            histogram(layer.k),
            str(layer.v) if isinstance(layer.v, int) else histogram(layer.v),
            f"{page.page_bytes / W:.0f}",
            f"{page.ratio:.2f}",
        )
        for i, (layer, page) in enumerate(zip(recipe.layers, pages, strict=True))
    ]
    all_k = [row for layer in recipe.layers for row in layer.k]
    total = sum(page.page_bytes for page in pages) / W
    rows.append(("all", histogram(all_k), "", f"{total:.0f}", f"{ratio_of(recipe):.2f}"))
    return "\n".join(
        [
            f"{recipe.name} for {model.architecture}: {model.num_layers} layers,"
            f" {model.num_kv_heads} KV heads of {model.head_size}",
            f"pages of {W} tokens, {recipe.coefficients} coefficients of {recipe.coefficient_bits}"
            f" bits; raw: {recipe.sink_tokens} first, {recipe.local_window} recent tokens",
            *table([HEADER, *rows]),
            origin(recipe),
        ]
    )


def histogram(rows: Sequence[Sequence[int]]) -> str:
    """Dims at each number of bits, most bits first: `12x8 96x4 84x2`."""
    counts = Counter(bits for row in rows for bits in row)
    return " ".join(f"{counts[bits]}x{bits}" for bits in sorted(counts, reverse=True))


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def origin(recipe: Recipe) -> str:
    """Provenance in a line."""
    p = recipe.provenance
    facts = [
        p.model and f"model {p.model}",
        p.text and f"text {p.text}",
        None if p.tokens is None else f"{p.tokens} tokens",
        p.date,
        p.tool,
        None if p.kl is None else f"KL {p.kl:.4f}",
        None if p.nll is None else f"NLL {p.nll:+.4f}",
    ]
    return "; ".join([f"source: {p.source}", *(fact for fact in facts if fact)])
