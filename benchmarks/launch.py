"""Host time of a launch whose kernel takes its arguments flat, or some of them as nested NamedTuples.

    python -m benchmarks.launch [--out FILE]

Needs a GPU. Two kernels do the same with 38 arguments; the second takes 30 of them, five groups of six, as
two tuples. Microseconds of the host a launch, median of the runs: by Triton's binder, and again as
`kernels/gpu/launch.py` does it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from benchmarks.record import RESULTS, save
from fourier_vllm.evaluation.machine import commit, versions

RUNS, LAUNCHES, GRID, SIZE = 7, 1000, (1, 1, 1), 128
NUMBERS = (17, 19, 21, 23, 25, 27, 29)  # arguments of their own in both kernels


class Group(NamedTuple):
    p: Any
    a: Any = 3
    b: Any = 5
    c: Any = 7
    d: Any = 9
    e: Any = 11


class Two(NamedTuple):
    x: Group
    y: Group


class Three(NamedTuple):
    x: Group
    y: Group
    z: Group


@triton.jit
def flat_kernel(
    p_out, n0, n1, n2, n3, n4, n5, n6,
    p0, a0, b0, c0, d0, e0, p1, a1, b1, c1, d1, e1, p2, a2, b2, c2, d2, e2,
    p3, a3, b3, c3, d3, e3, p4, a4, b4, c4, d4, e4, SIZE: tl.constexpr,
):  # fmt: skip
    o = tl.arange(0, SIZE)
    b_x = tl.load(p0 + o) * a0 + b0 * c0 + d0 * e0 + tl.load(p1 + o) * a1 + b1 * c1 + d1 * e1
    b_x += tl.load(p2 + o) * a2 + b2 * c2 + d2 * e2 + tl.load(p3 + o) * a3 + b3 * c3 + d3 * e3
    b_x += tl.load(p4 + o) * a4 + b4 * c4 + d4 * e4
    tl.store(p_out + o, b_x + n0 + n1 + n2 + n3 + n4 + n5 + n6)


@triton.jit
def term(g, o):
    return tl.load(g.p + o) * g.a + g.b * g.c + g.d * g.e


@triton.jit
def nested_kernel(p_out, n0, n1, n2, n3, n4, n5, n6, two, three, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    b_x = term(two.x, o) + term(two.y, o)
    b_x += term(three.x, o) + term(three.y, o) + term(three.z, o)
    tl.store(p_out + o, b_x + n0 + n1 + n2 + n3 + n4 + n5 + n6)


def host_us(launch: Callable[..., Any], *args: Any) -> float:
    times = []
    for _ in range(RUNS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(LAUNCHES):
            launch(*args)
        times.append((time.perf_counter() - begin) / LAUNCHES * 1e6)
    return round(statistics.median(times), 2)


def flat(groups: list[Group]) -> list[Any]:
    return [x for group in groups for x in group]


def nested(groups: list[Group]) -> list[Any]:
    return [Two(*groups[:2]), Three(*groups[2:])]


def measure() -> list[dict[str, Any]]:
    out, *tensors = torch.ones((6, SIZE), dtype=torch.int32, device="cuda")
    rows: list[dict[str, Any]] = []
    results = []
    for form, kernel in ((flat, flat_kernel), (nested, nested_kernel)):
        args = out, *NUMBERS, *form([Group(x) for x in tensors]), SIZE
        addresses = form([Group(x.data_ptr()) for x in tensors])
        compiled = kernel[GRID](*args)
        results.append(out.clone())
        row = {"arguments": form.__name__, "binder_us": host_us(kernel[GRID], *args)}
        again = out.data_ptr(), *NUMBERS, *addresses, SIZE
        row["again_us"] = host_us(compiled[GRID], *again)
        rows.append(row | {"registers": compiled.n_regs})
    assert torch.equal(*results)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "launch.json")
    args = parser.parse_args()
    where = {"gpu": torch.cuda.get_device_name(), "commit": commit(), **versions("triton")}
    rows = [row | where for row in measure()]
    print(*rows, sep="\n")
    save(args.out, rows)


if __name__ == "__main__":
    main()
