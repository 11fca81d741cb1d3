"""`fourier-vllm inspect --plot`: bits of every layer, head and dim as a picture (the paper's figure 7)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fourier_vllm._text import show
from fourier_vllm.recipe import Recipe

SUFFIXES = (".png", ".svg")
BITS = (0, 2, 3, 4, 8, 16)
COLORS = ("#f7f7f7", "#fee391", "#fec44f", "#ec7014", "#a50f15", "#2d0008")
INCHES_A_LAYER, LEAST_INCHES = 0.14, 2.5

Rows = Sequence[Sequence[int]]  # [layers][columns]


def plot(recipe: Recipe, file: Path) -> None:
    """Draw the recipe, a row a layer and a column a K dim; V beside it.

    Parameters
    ----------
    file : Path
        `.png` or `.svg` decides what is written.

    Raises
    ------
    ValueError
        Another suffix, no matplotlib, or a file that cannot be written.
    """
    if file.suffix not in SUFFIXES:
        raise ValueError(f"--plot must end in .png or .svg, found {show(file, 120)}: rename it.")
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot as plt
    except ImportError:
        raise ValueError(
            "--plot needs matplotlib: install it with `pip install 'fourier-vllm[eval]'`."
        ) from None
    model = recipe.model
    k = [flat(layer.k) for layer in recipe.layers]
    v = [[layer.v] if isinstance(layer.v, int) else flat(layer.v) for layer in recipe.layers]
    by_dim = max(map(len, v)) > 1
    height = max(LEAST_INCHES, INCHES_A_LAYER * model.num_layers + 1)
    figure, (left, right) = plt.subplots(
        1,
        2,
        figsize=(10, height),
        sharey=True,
        width_ratios=(1, 1) if by_dim else (20, 1),
        layout="constrained",
    )
    image = draw(left, k, "K", model.num_kv_heads, model.head_size)
    draw(right, stretched(v), "V", model.num_kv_heads if by_dim else 1, model.head_size)
    left.set_ylabel("layer")
    if not by_dim:
        right.set_xticks([])
    bar = figure.colorbar(image, ax=(left, right), ticks=range(len(BITS)))
    bar.set_ticklabels([str(bits) for bits in BITS])
    bar.set_label("bits")
    figure.suptitle(f"{recipe.name} for {model.architecture}", fontsize="medium")
    try:
        figure.savefig(file, dpi=160)
    except OSError as error:
        raise ValueError(
            f"--plot {show(file, 120)} cannot be written ({error.strerror}): give a file in an"
            " existing, writable folder."
        ) from None
    finally:
        plt.close(figure)


def draw(axes: Any, rows: Rows, name: str, heads: int, head_size: int) -> Any:
    """One tensor: a row a layer, a black line between heads."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    classes = [[BITS.index(bits) for bits in row] for row in rows]
    norm = BoundaryNorm([i - 0.5 for i in range(len(BITS) + 1)], len(BITS))
    image = axes.imshow(
        classes, aspect="auto", interpolation="nearest", cmap=ListedColormap(COLORS), norm=norm
    )
    for head in range(1, heads):
        axes.axvline(head * head_size - 0.5, color="black", linewidth=0.8)
    axes.set_title(name)
    axes.set_xlabel("head x dim" if heads > 1 or len(rows[0]) > 1 else "")
    return image


def flat(rows: Rows) -> list[int]:
    """Bits of all heads, one after the other."""
    return [bits for row in rows for bits in row]


def stretched(rows: Rows) -> Rows:
    """Layers with one number of bits for all dims, as wide as those with one a dim."""
    width = max(map(len, rows))
    return [list(row) * (width // len(row)) for row in rows]
