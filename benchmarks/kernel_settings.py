"""Launch settings of the decode kernel over pages, timed: what `kernels/decode.py` has was chosen from this.

    python benchmarks/kernel_settings.py [--batch 32] [--context 32768] [--out FILE]

Needs a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from fourier_vllm.evaluation.machine import commit
from fourier_vllm.kernels import decode
from kernels import Decode, Timer, copy_bandwidth  # benchmarks/kernels.py, beside this file

ROOT = Path(__file__).resolve().parent.parent


class Override:
    """The kernel with other launch settings than its launcher's."""

    def __init__(self, kernel: Any, settings: dict[str, int]):
        self.kernel, self.settings = kernel, settings

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        launch = self.kernel[grid]
        return lambda *args, **options: launch(*args, **{**options, **self.settings})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results/kernel_settings.json"
    )
    args = parser.parse_args()
    timer = Timer(11)
    bandwidth = copy_bandwidth(timer)
    Hq, H, D = 32, 8, 128
    case = Decode(Hq, H, D, args.batch, args.context)
    floor = case.num_bytes / bandwidth
    rows = []
    for splits, warps, stages, BN in itertools.product((4, 8, 16), (1, 2, 4), (1, 2), (32, 64)):
        case.splits = splits
        case.acc = torch.empty(args.batch, Hq, splits, D, device="cuda")
        case.lse = torch.empty(args.batch, Hq, splits, device="cuda")
        settings = {"num_warps": warps, "num_stages": stages, "BN": BN}
        with patch.object(decode, "pages_kernel", Override(decode.pages_kernel, settings)):
            time, spread = timer(case.pages_only)
        rows.append(
            {"splits": splits, **settings, "us": time, "spread_us": spread, "share": floor / time}
        )
        print(rows[-1], flush=True)
    head = {"shape": "llama-3.1-8b", "batch": args.batch, "context": args.context}
    head |= {"floor_us": floor, "gpu": torch.cuda.get_device_name(), "commit": commit()}
    args.out.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
