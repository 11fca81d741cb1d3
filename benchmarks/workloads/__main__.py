"""What people run, through whole engines side by side: benchmarks/results/workloads.json.

    python -m benchmarks.workloads [--model FOLDER] [--engines stock fp8 fourier ...]

Engines run one after the other, each in a process of its own, with the same requests of random tokens, prefix
caching on. Workloads: `answers` (long answers, all at once), `agents` (conversations over 16,000 tokens that
come back three times, 16 at once), `bursts` (first tokens when many come at once), `limit` and `steady` (the
same requests all at once, then at 70 % of the rate that the first engine reached), `mixed` (prompts' chunks
beside decodes). Without `--model`: the shape of Llama-3.1-8B with made-up weights. `--small` is for a try.
"""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path

import torch

from benchmarks.record import RESULTS, load, save
from benchmarks.serve import ENGINES, SHAPES, rows_of
from benchmarks.workloads.engine import STEADY, run
from fourier_vllm.evaluation.machine import commit, machine, versions

NAMES = ("answers", "agents", "bursts", "limit", "steady", "mixed")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder; default: made-up weights of a shape")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=["stock", "fp8", "fourier"]
    )
    parser.add_argument("--workloads", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--small", action="store_true", help="few and short requests")
    parser.add_argument(
        "--agents", type=int, help="conversations, where the GPU is to hold too few"
    )
    parser.add_argument(
        "--offload-gib", type=float, default=0, help="CPU memory below the GPU's, for every engine"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=float, default=0.85, help="share of the GPU's memory")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--append", action="store_true", help="to the rows that are there")
    parser.add_argument("--out", type=Path, default=RESULTS / "workloads.json")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if "steady" in args.workloads and "limit" not in args.workloads:
        args.workloads.append("limit")
    done = load(args.out) if args.append and args.out.exists() else []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {
        "model": (args.model and Path(args.model).name) or f"{args.shape} shape, made-up weights",
        "gpu": machine(device)["device"],
        "offload_gib": args.offload_gib,
        "commit": commit(),
        **versions("vllm"),
    }
    spawn = multiprocessing.get_context("spawn")
    rate = None
    for engine in args.engines:
        rows = spawn.Queue()
        process = spawn.Process(target=run, args=(args, engine, rate, rows))
        process.start()
        for row in rows_of(process, rows):
            print(row, flush=True)
            done.append(row | about)
            save(args.out, done)
            if row["workload"] == "limit":
                rate = rate or STEADY * row["req_s"]
        process.join()
        if process.exitcode:
            error = f"ended with exit code {process.exitcode}"
            done.append({"engine": engine, "error": error} | about)
            print(done[-1], flush=True)
            save(args.out, done)


if __name__ == "__main__":
    main()
