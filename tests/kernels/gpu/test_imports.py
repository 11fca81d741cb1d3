"""What the GPU path imports: neither the CPU's compiler nor the reference that its tests compare with."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from importlib import import_module
from pkgutil import iter_modules
for package in ("fourier_vllm.kernels.gpu", "fourier_vllm.engine.gpu"):
    for module in iter_modules(import_module(package).__path__, package + "."):
        import_module(module.name)
print(*sys.modules, sep="\\n")
"""


def test_neither_numba_nor_the_reference():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True
    )
    found = done.stdout.split()
    assert "fourier_vllm.kernels.gpu.seal" in found
    assert "fourier_vllm.engine.gpu.path" in found
    unwanted = ("numba", "fourier_vllm.kernels.cpu", "fourier_vllm.kernels.reference")
    assert not [name for name in found if name.startswith(unwanted)]
