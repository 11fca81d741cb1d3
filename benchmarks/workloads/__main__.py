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
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS, load, save
from benchmarks.serve import ENGINES, SHAPES, settings
from benchmarks.workloads.drive import drive, summary
from benchmarks.workloads.traffic import LARGE, SMALL, Request, Traffic, arrivals, workloads
from fourier_vllm.evaluation.machine import commit, machine, versions

NAMES = ("answers", "agents", "bursts", "limit", "steady", "mixed")
STEADY = 0.7  # of the limit
MAX_MODEL_LEN = 32768
COUNTERS = {
    "preempted": "vllm:num_preemptions",
    "hits": "vllm:prefix_cache_hits",
    "queries": "vllm:prefix_cache_queries",
}


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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=float, default=0.85, help="share of the GPU's memory")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--append", action="store_true", help="to the rows that are there")
    parser.add_argument("--out", type=Path, default=RESULTS / "workloads.json")
    return parser.parse_args()


def options(args: argparse.Namespace, engine: str, folder: str) -> dict[str, Any]:
    """Options of `LLM`."""
    found = settings(args, engine, MAX_MODEL_LEN, folder)
    found |= {"enable_prefix_caching": True, "max_num_seqs": 256}
    if not torch.cuda.is_available():
        found |= {"max_model_len": 4096, "kv_cache_memory_bytes": 1 << 28, "enforce_eager": True}
        if engine == "stock":
            del found["attention_backend"]
    return found


def counters(llm: Any) -> dict[str, float]:
    values = {m.name: m.value for m in llm.get_metrics() if m.name in COUNTERS.values()}
    return {short: values.get(name, 0) for short, name in COUNTERS.items()}


def measured(llm: Any, traffic: Traffic) -> dict[str, Any]:
    """A row of one workload, from an empty prefix cache."""
    llm.reset_prefix_cache()
    before = counters(llm)
    row = summary(*drive(llm, traffic))
    found = {name: value - before[name] for name, value in counters(llm).items()}
    row["hit_rate"] = round(found["hits"] / max(1, found["queries"]), 3)
    return row | {"preempted": int(found["preempted"])}


def run(args: argparse.Namespace, engine: str, rate: float | None, rows: Any) -> None:
    """All workloads of one engine; a row is sent as soon as it is measured, None at the end."""
    from fourier_vllm.evaluation.engine_session import running

    sizes = SMALL if args.small else LARGE
    with (
        tempfile.TemporaryDirectory() as folder,
        running(options(args, engine, folder)) as llm,
    ):
        kv_tokens = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
        about = {"engine": engine, "kv_tokens": kv_tokens}
        # What is compiled or allocated on first use.
        drive(llm, Traffic([Request(f"warm-{i}", list(range(1000, 1600)), 8) for i in range(4)]))
        for name, make in workloads(sizes, args.workloads):
            row = measured(llm, make(args.seed))
            if name == "limit":
                rate = rate or STEADY * row["req_s"]
            rows.put(about | {"workload": name} | row)
        if "steady" in args.workloads and rate is not None:
            row = measured(llm, arrivals(sizes, args.seed, rate))
            rows.put(about | {"workload": "steady", "rate": round(rate, 3)} | row)
    rows.put(None)


def main() -> None:
    args = parse()
    if "steady" in args.workloads and "limit" not in args.workloads:
        args.workloads.append("limit")
    done = load(args.out) if args.append and args.out.exists() else []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {
        "model": (args.model and Path(args.model).name) or f"{args.shape} shape, made-up weights",
        "gpu": machine(device)["device"],
        "commit": commit(),
        **versions("vllm"),
    }
    spawn = multiprocessing.get_context("spawn")
    rate = None
    for engine in args.engines:
        rows = spawn.Queue()
        process = spawn.Process(target=run, args=(args, engine, rate, rows))
        process.start()
        for row in until_none(process, rows):
            print(row, flush=True)
            done.append(row | about)
            save(args.out, done)
            if row["workload"] == "limit":
                rate = rate or STEADY * row["req_s"]
        process.join()
        if process.exitcode:
            raise SystemExit(f"engine {engine} ended with exit code {process.exitcode}")


def until_none(process: Any, rows: Any) -> Any:
    """Rows until the process says that it is done, or dies."""
    import queue

    while True:
        try:
            row = rows.get(timeout=1)
        except queue.Empty:
            if process.is_alive():
                continue
            return
        if row is None:
            return
        yield row


if __name__ == "__main__":
    main()
