"""Seals and rebuilds whole pages in plain PyTorch: the ground truth for every kernel, and the CPU path."""

from __future__ import annotations

import torch

from fourier_vllm.kernels.reference.codecs import ChannelCodec, TokenCodec
from fourier_vllm.kernels.reference.codecs_fragments import FragmentChannelCodec, FragmentTokenCodec
from fourier_vllm.page import PageLayout, TokenPlanes


class PageCodec:
    """Seals, rebuilds and attends pages of one layer.

    Parameters
    ----------
    layout : PageLayout
    dtype : torch.dtype
        Model dtype, of raw planes and 16-bit coefficients.
    """

    def __init__(self, layout: PageLayout, dtype: torch.dtype, device: torch.device | str = "cpu"):
        device = torch.device(device)
        self.layout = layout
        channel = FragmentChannelCodec if layout.fragments else ChannelCodec
        token = FragmentTokenCodec if layout.fragments else TokenCodec
        self.k = channel(layout.k, layout, dtype, device)
        self.v = (
            token(layout.v, layout, dtype, device)
            if isinstance(layout.v, TokenPlanes)
            else ChannelCodec(layout.v, layout, dtype, device)
        )

    def seal(
        self, k: torch.Tensor, v: torch.Tensor, num_pinned: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Seal pages.

        Parameters
        ----------
        k, v : torch.Tensor
            `[P, W, H, D]`, any float dtype, post-RoPE keys.
        num_pinned : torch.Tensor, optional
            `[P]`, leading tokens of each page that attention reads raw (the attention sinks): they
            are replaced by the mean of the others, so that their outsized keys cost no precision.

        Returns
        -------
        torch.Tensor
            `[P, page_bytes]` uint8.
        """
        k, v = k.float(), v.float()
        if num_pinned is not None:
            pinned = torch.arange(k.shape[1], device=k.device)[None] < num_pinned[:, None]
            mask = pinned[:, :, None, None]
            others = (~mask).sum(1, keepdim=True).clamp_min(1)
            k = torch.where(mask, (k * ~mask).sum(1, keepdim=True) / others, k)
            v = torch.where(mask, (v * ~mask).sum(1, keepdim=True) / others, v)
        pages = k.new_zeros((k.shape[0], self.layout.page_bytes), dtype=torch.uint8)
        self.k.seal(k, pages)
        self.v.seal(v, pages)
        return pages

    def reconstruct(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of `pages [P, page_bytes]`, each `[P, W, H, D]` float32."""
        return self.k.reconstruct(pages), self.v.reconstruct(pages)


def through_pages(
    codec: PageCodec, k: torch.Tensor, v: torch.Tensor, pinned: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Seal whole pages and rebuild them.

    Parameters
    ----------
    k, v : torch.Tensor [H, n, D]
    pinned : int
        First tokens that attention reads raw: they come back as given, and so does what is behind the
        last whole page.
    """
    W = codec.layout.page_size
    end = k.shape[1] // W * W

    def paged(x: torch.Tensor) -> torch.Tensor:
        return x[:, :end].unflatten(1, (-1, W)).permute(1, 2, 0, 3)  # [P, W, H, D]

    # Pages that are all pinned never occur: a recipe pins one page at most, a run one more token.
    num_pinned = (pinned - W * torch.arange(end // W, device=k.device)).clamp(0, W)
    rebuilt = codec.reconstruct(codec.seal(paged(k), paged(v), num_pinned))
    k, v = k.clone(), v.clone()
    for x, y in zip((k, v), rebuilt, strict=True):
        x[:, pinned:end] = y.flatten(0, 1).transpose(0, 1)[:, pinned:]
    return k, v
