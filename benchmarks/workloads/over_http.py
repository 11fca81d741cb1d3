"""vLLM's own load generator against `vllm serve`: repeated prefixes, and a trace of sessions that come back.

    python -m benchmarks.workloads.over_http MODEL [--engines stock fp8 fourier]

MODEL is a folder with a tokenizer. Engines are served one after the other, with the same requests
(`vllm bench serve`, data sets `prefix_repetition` and `timed_trace`; the trace is made by `trace.py`). Rows
are added to the file of `python -m benchmarks.workloads`, whose rows are of engines without a server.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import requests
import torch

from benchmarks.record import RESULTS, load, save
from benchmarks.serve import ENGINES
from benchmarks.workloads.trace import CHUNK, make_trace
from fourier_vllm.demo.server import Server, vllm_command
from fourier_vllm.evaluation.machine import commit, machine, versions

COUNTERS = ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--engines", nargs="+", choices=ENGINES, default=["stock", "fp8", "fourier"]
    )
    parser.add_argument("--max-model-len", type=int, default=32768)
    parser.add_argument("--seconds", type=float, default=120, help="of the trace")
    parser.add_argument("--sessions-per-second", type=float, default=0.5)
    parser.add_argument("--small", action="store_true", help="few and short requests, for a try")
    parser.add_argument(
        "--serve-arguments", nargs="*", default=[], help="of `vllm serve`, without --"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "workloads.json")
    return parser.parse_args()


def workloads(args: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Arguments of `vllm bench serve`, by workload."""
    trace = make_trace(args.seconds, args.sessions_per_second, seed=0)
    trace = [x for x in trace if x["input_length"] + x["output_length"] < args.max_model_len]
    file = folder / "trace.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in trace))
    prefixes = {"prefix-len": 8192, "suffix-len": 512, "num-prefixes": 16, "output-len": 128}
    count = 128
    if args.small:
        prefixes = {"prefix-len": 256, "suffix-len": 32, "num-prefixes": 2, "output-len": 8}
        count = 6
    repeated = [f"--prefix-repetition-{name}={value}" for name, value in prefixes.items()]
    timed = [f"--dataset-path={file}", f"--timed-trace-chunk-hash-size={CHUNK}"]
    return {
        "prefix_repetition": [f"--num-prompts={count}", "--max-concurrency=16", *repeated],
        "timed_trace": [
            f"--num-prompts={len(trace)}",
            "--timed-trace-sec-multiplier=0.001",
            *timed,
        ],
    }


def serve_arguments(args: argparse.Namespace, engine: str) -> list[str]:
    """Of `vllm serve`."""
    found = ["--dtype=bfloat16", f"--max-model-len={args.max_model_len}"]
    for name, value in ENGINES[engine].items():
        if name == "attention_backend" and engine == "stock" and not torch.cuda.is_available():
            continue
        text = json.dumps(value) if isinstance(value, dict) else value
        found.append(f"--{name.replace('_', '-')}={text}")
    return found + [f"--{argument}" for argument in args.serve_arguments]


def counters(url: str) -> list[float]:
    session = requests.Session()
    session.trust_env = False  # no proxy between us and loopback
    text = session.get(f"{url}/metrics", timeout=30).text
    return [
        sum(float(x) for x in re.findall(rf"^{re.escape(name)}{{.*}} (\S+)$", text, re.M))
        for name in COUNTERS
    ]


def run(
    server: Server, model: Path, name: str, arguments: list[str], folder: Path
) -> dict[str, Any]:
    """One workload against a server."""
    before = counters(server.url)
    command = [vllm_command(), "bench", "serve", "--backend=openai", f"--base-url={server.url}"]
    command += [f"--model={model}", f"--dataset-name={name}", "--ignore-eos", "--seed=0"]
    command += ["--save-result", f"--result-dir={folder}", "--result-filename=result.json"]
    subprocess.run([*command, *arguments], check=True)
    result = load(folder / "result.json")
    hits, queries = (b - a for a, b in zip(before, counters(server.url), strict=True))
    return {
        "workload": name,
        "requests": result["completed"],
        "failed": result["failed"],
        "makespan_s": round(result["duration"], 2),
        "req_s": round(result["request_throughput"], 3),
        "out_tok_s": round(result["output_throughput"], 1),
        "ttft_ms": [round(result[f"{x}_ttft_ms"], 1) for x in ("median", "p99")],
        "itl_ms": [round(result[f"{x}_itl_ms"], 1) for x in ("median", "p99")],
        "hit_rate": round(hits / max(1, queries), 3),
    }


def main() -> None:
    args = parse()
    rows = load(args.out) if args.out.exists() else []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {"model": args.model.name, "gpu": machine(device)["device"], "commit": commit()}
    about |= versions("vllm")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = workloads(args, folder)
        for engine in args.engines:
            with Server(args.model, serve_arguments(args, engine), folder / "log") as server:
                for workload, arguments in made.items():
                    row = {"engine": engine} | run(server, args.model, workload, arguments, folder)
                    print(row, flush=True)
                    rows.append(row | about)
                    save(args.out, rows)


if __name__ == "__main__":
    main()
