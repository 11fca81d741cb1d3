"""Where the tests of the Triton kernels run: on a GPU, else in Triton's interpreter.

Triton decides when it is imported, so that the interpreter needs a process of its own: TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU, or TRITON_INTERPRET=1",
)
