"""The formats that are compared, by name. A new one is a small file here and a line in `COMPARATORS`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fourier_vllm.evaluation.formats.base import Format
from fourier_vllm.evaluation.formats.exact import Exact
from fourier_vllm.evaluation.formats.fp8 import Fp8
from fourier_vllm.evaluation.formats.kivi import Kivi
from fourier_vllm.evaluation.formats.paper import Paper
from fourier_vllm.evaluation.formats.rotated import Rotated
from fourier_vllm.evaluation.formats.streaming import Streaming
from fourier_vllm.recipe import ModelFingerprint

COMPARATORS: dict[str, Callable[[ModelFingerprint], Format]] = {
    "exact": Exact,
    "fp8": Fp8,
    "kivi4": partial(Kivi, bits=4),
    "kivi3": partial(Kivi, bits=3),
    "kivi2": partial(Kivi, bits=2),
    "rotated4": partial(Rotated, bits=4),
    "rotated3": partial(Rotated, bits=3),
    "rotated2": partial(Rotated, bits=2),
    "paper": Paper,
    "paper-rescaled": partial(Paper, rescale=True),
    "streaming": Streaming,
}
