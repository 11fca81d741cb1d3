"""The Triton kernels for tests: compiled where there is a GPU, else in Triton's interpreter.

Triton decides when it is imported, so that the interpreter needs a process of its own: TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from fourier_vllm.kernels import decode, decode_raw, prefill, reduce, seal, tables  # noqa: E402

__all__ = ["DEVICE", "decode", "decode_raw", "prefill", "reduce", "seal", "tables"]
