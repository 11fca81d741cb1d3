"""Launching a kernel again passes what Triton's own launch passed, in the kernel's order."""

from __future__ import annotations

from typing import Any

import torch

from fourier_vllm.kernels.gpu.launch import Launch


class Kernel:
    """Stands for a JIT function: binds like Triton, and what it returns records what it is launched on."""

    arg_names = ("p_x", "n", "p_table", "scale", "A", "B")

    def __init__(self, interpreted: bool) -> None:
        self.interpreted = interpreted
        self.calls: list[tuple[Any, ...]] = []
        self.again: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, num_warps: int, **constants: int) -> Any:
            self.calls.append((grid, num_warps, *args, *(constants[n] for n in ("A", "B"))))
            return None if self.interpreted else {grid: lambda *again: self.again.append(again)}

        return launch


def run(kernel: Kernel) -> tuple[torch.Tensor, torch.Tensor]:
    x, table = torch.zeros(4), torch.ones(2)
    launch = Launch(kernel, (2, 3, 1), (table, 0.5), dict(B=7, A=6), num_warps=4)
    for n in (1, 16, 5):
        launch((x,), n)
    return x, table


def test_the_first_launch_compiles_and_the_others_do_not():
    kernel = Kernel(interpreted=False)
    x, table = run(kernel)
    ((grid, num_warps, *args),) = kernel.calls
    assert (grid, num_warps) == ((2, 3, 1), 4)
    assert args[0] is x
    assert args[1:] == [1, table, 0.5, 6, 7]
    pointers = x.data_ptr(), table.data_ptr()
    assert kernel.again == [(pointers[0], n, pointers[1], 0.5, 6, 7) for n in (16, 5)]


def test_the_interpreter_compiles_nothing():
    kernel = Kernel(interpreted=True)
    run(kernel)
    assert [call[3] for call in kernel.calls] == [1, 16, 5]
