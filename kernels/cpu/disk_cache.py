"""`jit`: numba's compiler with its cache on disk, without which everything works as well."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache

logger = logging.getLogger("vllm.fourier_vllm")


@cache
def _say_once() -> None:
    logger.warning(
        "fourier: numba's cache cannot be used, so that every start compiles for ten seconds: set "
        "NUMBA_CACHE_DIR to a folder of your own that can be written"
    )


class _Cache(FunctionCache):
    """Files that are damaged, of another owner or nowhere to be put are passed over."""

    @contextmanager
    def _guard_against_spurious_io_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            _say_once()


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Like `numba.njit(cache=True)`."""

    def compile_lazily(function: Callable[..., Any]) -> Any:
        compiled = njit(nogil=True, **options)(function)
        try:
            compiled._cache = _Cache(function)
        except (RuntimeError, OSError):  # there is no folder for it
            _say_once()
        return compiled

    return compile_lazily
