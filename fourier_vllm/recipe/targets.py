"""Named targets: how small pages are, and the recipes that need no statistics."""

from __future__ import annotations

from typing import NamedTuple

from fourier_vllm._json import RecipeError
from fourier_vllm._text import nearest, show
from fourier_vllm.recipe.schema import (
    DEFAULT_LOCAL_WINDOW,
    DEFAULT_PAGE_SIZE,
    DEFAULT_SINK_TOKENS,
    FORMAT,
    ModelFingerprint,
    Recipe,
)


class Target(NamedTuple):
    """What a named target asks for.

    Attributes
    ----------
    ratio : float or None
        Raw 16-bit bytes of a page over bytes of the sealed page; None where no budget rules.
    v_bits : int or None
        Bits of V's token codec where no calibration says better; None where V uses the channel codec.
    coefficient_share : float
        Spectral coefficients of a page over its tokens.
    coefficient_bits : int
        8 (one fp16 scale a coefficient row) or 16 (model dtype).
    help : str
        One line for the documentation.
    """

    ratio: float | None
    v_bits: int | None
    coefficient_share: float
    coefficient_bits: int
    help: str

    def coefficients(self, page_size: int) -> int:
        """Coefficients of a page of `page_size` tokens."""
        return round(page_size * self.coefficient_share)


TARGETS: dict[str, Target] = {
    "quality": Target(4.5, 3, 1 / 32, 8, "4.5 times smaller"),
    "balanced": Target(6.3, 2, 1 / 32, 8, "6.3 times smaller"),
    "compact": Target(7.5, 2, 1 / 32, 8, "7.5 times smaller"),
    "paper": Target(None, None, 1 / 8, 16, "FourierAttention: 24 % of the dims raw, the rest low"),
    "lossless": Target(None, 16, 0.0, 16, "every dim raw, for tests: nothing is saved"),
}

# What runs where the user names no target. At 6.3 times smaller, predicted bits lost answers of real models
# that measured bits keep (docs/use/recipes.md).
MEASURED_TARGET, PREDICTED_TARGET = "balanced", "quality"


def target_recipe(
    fingerprint: ModelFingerprint,
    target: str,
    page_size: int = DEFAULT_PAGE_SIZE,
    sink_tokens: int = DEFAULT_SINK_TOKENS,
    local_window: int = DEFAULT_LOCAL_WINDOW,
) -> Recipe:
    """A recipe that needs no statistics: `lossless`, or `paper` with the first dims kept.

    `calibration.weights.weight_recipe` chooses the dims of `paper` by their energy instead.

    Raises
    ------
    RecipeError
        The target is unknown or needs statistics, or a count is outside the schema.
    """
    if not isinstance(target, str) or target not in TARGETS:
        raise RecipeError(f"target {show(target)} is unknown: {nearest(target, TARGETS)}.")
    L, H, D = fingerprint.num_layers, fingerprint.num_kv_heads, fingerprint.head_size
    if target == "lossless":
        layers = [{"k": [[16] * D] * H, "v": 16}] * L
    elif target == "paper":
        layers = [
            {"k": [[16] * k + [0] * (D - k)] * H, "v": [[16] * v + [0] * (D - v)] * H}
            for k, v in paper_counts(L, D)
        ]
    else:
        raise RecipeError(
            f"target {target!r} needs statistics of the model: make a recipe with `fourier-vllm"
            " calibrate`, or choose lossless or paper."
        )
    return Recipe.from_dict(
        {
            "format": FORMAT,
            "name": target,
            "model": fingerprint,
            "page_size": page_size,
            "sink_tokens": sink_tokens,
            "local_window": local_window,
            "coefficients": TARGETS[target].coefficients(page_size),
            "coefficient_bits": TARGETS[target].coefficient_bits,
            "layers": layers,
            "provenance": {"source": "manual", "text": f"target {target}"},
        },
        f"target {target}",
    )


def paper_pyramid(num_layers: int) -> list[tuple[float, float]]:
    """Shares of K and V dims that the paper's inverted pyramid low-passes in each layer, 76 % of all.

    The first seventh of the layers, the last two sevenths and the rest, as the authors' code has it
    for 28 layers.
    """
    first, last = max(1, round(num_layers / 7)), num_layers - round(2 * num_layers / 7)
    return [
        (0.9, 0.95) if i < first else (0.5, 0.7) if i >= last else (0.8, 0.8)
        for i in range(num_layers)
    ]


def paper_counts(num_layers: int, head_size: int) -> list[tuple[int, int]]:
    """Raw dims a head in the paper's inverted pyramid, rounded to a multiple of 8.

    Returns
    -------
    list of (int, int)
        K and V counts of each layer, multiples of 8 from 8 to `head_size`; 24 % of all dims.
    """

    def kept(share: float) -> int:
        return min(head_size, max(8, round(head_size * (1 - share) / 8) * 8))

    return [(kept(k), kept(v)) for k, v in paper_pyramid(num_layers)]
