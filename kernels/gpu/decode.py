"""Split-KV attention over sealed pages: partial outputs and log-sum-exps for `join.py`."""

from __future__ import annotations

from torch import Tensor

from fourier_vllm.kernels.gpu.decode_fragments import attend_fragment_pages
from fourier_vllm.kernels.gpu.decode_plain import attend_plain_pages
from fourier_vllm.kernels.gpu.step import Layer, Parts, Step


def attend_pages(layer: Layer, step: Step, q: Tensor, parts: Parts) -> None:
    """Partial attention of every query token over the pages it reads, by the kernel of the pages' order.

    A query token that sees n tokens reads the pages before its window, those of `Step.gap_pages` at least and
    those of `Step.num_pages` at most, without the sinks.

    Parameters
    ----------
    q : Tensor [T, Hq, D]
        16 bits or float32; a row's heads contiguous. A request may have no query tokens.
    parts : Parts
        The first `of_pages` are written. `query_columns` has written `columns`.
    """
    attend = attend_fragment_pages if layer.tables.layout.fragments else attend_plain_pages
    attend(layer, step, q, parts)
