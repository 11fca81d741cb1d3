"""Launches a kernel again without Triton's binder, which on a slow host takes longer than the kernel.

The first launch is Triton's usual one and compiles; what it returns is launched directly from then on, as in
Triton's own tutorials, with addresses for tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


class Launches(dict[Any, "Launch"]):
    """A layer's launches of one kernel, by what Triton specializes the kernel for."""


class Launch:
    """A kernel with its grid and all arguments but the first ones.

    Whatever Triton specializes the kernel for (dtypes, alignment and divisibility of arguments that are not
    excepted) shall be the same at every launch: the caller has one object for each.

    Parameters
    ----------
    kernel : triton.JITFunction
    grid : tuple of int
        Three.
    fixed : sequence of Tensor, int or float
        Arguments that follow those of a launch. Tensors stay where they are.
    constants : dict
        The kernel's `tl.constexpr` arguments, its last ones.
    options : int
        Of Triton's compiler.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        fixed: Sequence[Any],
        constants: dict[str, Any],
        **options: int,
    ) -> None:
        self.kernel, self.grid, self.fixed = kernel, grid, tuple(fixed)
        self.constants, self.options = constants, options
        self.again: Callable[..., None] | None = None
        self.rest: tuple[Any, ...] = ()

    def __call__(self, tensors: Sequence[Tensor], *numbers: int) -> None:
        """Launch on `tensors` and `numbers`, the kernel's first arguments."""
        if self.again is not None:
            self.again(*[x.data_ptr() for x in tensors], *numbers, *self.rest)
            return
        args = (*tensors, *numbers, *self.fixed)
        compiled = self.kernel[self.grid](*args, **self.constants, **self.options)
        if compiled is None:  # Triton's interpreter
            return
        fixed = [x.data_ptr() if isinstance(x, Tensor) else x for x in self.fixed]
        names = self.kernel.arg_names[len(args) :]
        self.rest = (*fixed, *(self.constants[name] for name in names))
        self.again = compiled[self.grid]
