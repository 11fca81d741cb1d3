"""Weighted sums of packed codes."""

from __future__ import annotations

import numpy as np

from fourier_vllm.kernels.cpu.memory import jit


@jit
def add_codes(
    codes: np.ndarray, bits: int, p: np.ndarray, rows: np.ndarray, out: np.ndarray
) -> None:
    """Add codes of `bits` bits, packed `[W * bits / 8, n]`, weighted by `p [G, W]`, to `out [G, n]`."""
    run, N = codes.shape
    mask = (1 << bits) - 1
    for half in range(2 // bits):
        for j in range(run):
            for f in range(4):
                shift = bits * (4 * half + f)
                for n in range(N):
                    rows[f, n] = np.int32((codes[j, n] >> shift) & mask)
            first = 4 * half * run + j
            for g in range(out.shape[0]):
                p0, p1 = p[g, first], p[g, first + run]
                p2, p3 = p[g, first + 2 * run], p[g, first + 3 * run]
                for n in range(N):
                    out[g, n] += (
                        p0 * rows[0, n] + p1 * rows[1, n] + p2 * rows[2, n] + p3 * rows[3, n]
                    )
