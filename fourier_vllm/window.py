"""What a query reads raw and what from pages: the sizes, and the one rule. Needs neither torch nor vLLM.

A query that sees n tokens, itself included, reads the first `pages_before(n)` pages of its request and every
token behind them raw; `sink_tokens` first ones are always raw. `kernels/gpu/split.py` has the rule in Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Count = TypeVar("Count", int, "Tensor")


def pages_before(n: Count, local_window: int, page_size: int) -> Count:
    """Whole pages before the last `local_window` of `n` tokens, an int or a tensor of ints."""
    return (n - local_window) // page_size * (n > local_window)


@dataclass(frozen=True)
class Window:
    """The sizes of one engine, in tokens.

    Attributes
    ----------
    page_size, local_window, sink_tokens : int
        Tokens of a page, recent and first tokens that are kept raw.
    block_size : int
        Tokens of a raw block.
    exact_prefill : bool
        Prompt tokens read raw all tokens of their request that are not cached pages.
    """

    page_size: int
    local_window: int
    sink_tokens: int
    block_size: int
    exact_prefill: bool

    @property
    def num_pinned_blocks(self) -> int:
        """Raw blocks that hold the sinks."""
        return -(-self.sink_tokens // self.block_size)

    @property
    def reach(self) -> int:
        """Raw tokens that cover what a query reads, and a page until it is sealed."""
        return self.local_window + self.page_size

    def pages_before(self, n: Count) -> Count:
        """Pages that a query reads which sees `n` tokens."""
        return pages_before(n, self.local_window, self.page_size)
