"""What transformers' image processors take from torchvision, which has no CPU build on PyPI.

On the path only of processes that need it, where torchvision itself is missing.
"""

from __future__ import annotations

import enum
import sys
from typing import Any

import numpy as np
import torch


class InterpolationMode(enum.Enum):
    NEAREST_EXACT = "nearest-exact"
    BOX = "box"
    BILINEAR = "bilinear"
    HAMMING = "hamming"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


def pil_to_tensor(image: Any) -> torch.Tensor:
    """`[channels, height, width]`, uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def resize(image: torch.Tensor, size: Any, **_: Any) -> torch.Tensor:
    """Only what changes nothing: the tests' images have the size that the model takes."""
    assert list(image.shape[-2:]) == list(size), (image.shape, size)
    return image


def normalize(image: torch.Tensor, mean: Any, std: Any, inplace: bool = False) -> torch.Tensor:
    mean, std = (torch.as_tensor(x, dtype=image.dtype)[:, None, None] for x in (mean, std))
    return (image - mean) / std


def __getattr__(name: str) -> Any:
    """What is imported beside these and never called."""
    if name.startswith("__"):
        raise AttributeError(name)
    return None


# One module under all the names that it is imported by.
io = transforms = v2 = functional = sys.modules[__name__]
for name in ("io", "transforms", "transforms.functional", "transforms.v2"):
    sys.modules[f"{__name__}.{name}"] = sys.modules[__name__]
sys.modules[f"{__name__}.transforms.v2.functional"] = sys.modules[__name__]
