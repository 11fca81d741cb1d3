"""Ours: a recipe's sealed pages, through the reference codec of the page format."""

from __future__ import annotations

import torch
from torch import Tensor

from fourier_vllm.evaluation.formats.base import Held
from fourier_vllm.kernels.reference.codec import PageCodec, through_pages
from fourier_vllm.recipe import Recipe
from fourier_vllm.recipe.describe import layouts


class Fourier:
    """Pages of one recipe.

    Parameters
    ----------
    recipe : Recipe
        Its sinks and local window are those of the run, which are the same for every format.
    name : str or None
        How the table calls it; None takes the recipe's name.
    """

    family = "fourier"

    def __init__(self, recipe: Recipe, name: str | None = None):
        self.name, self.recipe = name or recipe.name, recipe
        self.layouts = layouts(recipe)
        self.codecs: dict[int, PageCodec] = {}

    def hold(self, k: Tensor, v: Tensor, start: int, layer: int) -> Held:
        if layer not in self.codecs:
            # A model computed in float32 is still served in 16 bits.
            dtype = torch.bfloat16 if k.dtype == torch.float32 else k.dtype
            self.codecs[layer] = PageCodec(self.layouts[layer], dtype, k.device)
        sealed = through_pages(self.codecs[layer], k, v, start)
        middle = [x[:, start:] for x in sealed]
        return Held(middle[0], middle[1], self.bits(start, k.shape[1], layer))

    def bits(self, start: int, end: int, layer: int) -> float:
        """Stored bits a value of tokens `start` to `end`: whole pages, padding too."""
        layout = self.layouts[layer]
        values = 2 * layout.num_kv_heads * (end - start) * layout.head_size
        return 8 * (end // layout.page_size) * layout.page_bytes / values
