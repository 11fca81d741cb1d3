"""What a KV format is to the evaluation: exact keys and values in, what it gives back and its bits out."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

RAW_BITS = 16  # of a value of the model, and of every scale, zero, norm and coefficient


class Held(NamedTuple):
    """What a format holds of the middle of a context, in one layer.

    Attributes
    ----------
    k, v : Tensor [H, t, D]
        What attention gets instead; t is the length of the middle, or 0 where it is dropped.
    bits : float
        Stored bits over all values of exact K and V in the middle: codes, scales, zeros,
        coefficients and padding.
    """

    k: Tensor
    v: Tensor
    bits: float


class Format(Protocol):
    """One row of the table.

    Attributes
    ----------
    name, family : str
        Formats of one family make one line of the plot.
    """

    name: str
    family: str

    def hold(self, k: Tensor, v: Tensor, start: int, layer: int) -> Held:
        """Store the middle of a context and give it back.

        Parameters
        ----------
        k, v : Tensor [H, end, D]
            Exact keys after RoPE, and values, of all tokens before the local window.
        start : int
            First tokens that stay raw for every format; the middle is `start` to `end`.
        layer : int
            Index among the layers with full attention.
        """
        ...


def bits_per_value(stored: float, k: Tensor) -> float:
    """Stored bits of K and V over the values of both; `k` is one of them."""
    return stored / (2 * k.numel())
