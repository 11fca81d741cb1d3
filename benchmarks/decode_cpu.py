"""Speed of the CPU path against stock CPU attention: first token and decode steps at one context length.

    .venv/bin/python benchmarks/decode_cpu.py [--context 2000] [--tokens 64] [--model FOLDER]

Both engines run in this process, one after the other, with the same prompts; medians.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")
ROOT = Path(__file__).resolve().parent.parent


def machine() -> dict[str, Any]:
    """Where and on what a number was measured."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((x.split(":")[1].strip() for x in info if x.startswith("model name")), "unknown")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "vllm": version("vllm"),
        "torch": version("torch"),
        "commit": commit,
    }


PROMPTS = 4  # the first of them warms up


def times_of(
    model: str, backend: str | None, context: int, tokens: int
) -> tuple[list[float], list[float]]:
    """Seconds to the first token of each request, and of every decode step."""
    from vllm import SamplingParams

    from fourier_vllm.evaluation.engine_session import running

    options: dict[str, Any] = {"attention_backend": backend} if backend else {}
    settings: dict[str, Any] = {
        "model": model,
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_model_len": 8192,
        "kv_cache_memory_bytes": 1 << 30,
        "skip_tokenizer_init": True,
        **options,
    }
    rng = random.Random(0)
    prompts = [[rng.randrange(100, 40000) for _ in range(context)] for _ in range(PROMPTS)]
    params = SamplingParams(temperature=0, max_tokens=tokens, detokenize=False, ignore_eos=True)
    first: list[float] = []
    steps: list[float] = []
    with running(settings) as llm:
        engine = llm.llm_engine
        for i, ids in enumerate(prompts):
            engine.add_request(str(i), {"prompt_token_ids": ids}, params)
            outputs: list[float] = [time.perf_counter()]
            while engine.has_unfinished_requests():
                if engine.step():
                    outputs.append(time.perf_counter())
            took = [b - a for a, b in pairwise(outputs)]
            if i:
                first.append(took[0])
                steps += took[2:]
    return first, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results/decode_cpu.json"))
    args = parser.parse_args()
    if args.model is None:
        from fourier_vllm.demo.fetch import fetch

        args.model = str(fetch("smollm2"))
    rows = []
    for name, backend in (("stock", None), ("fourier", "fourier")):
        times = times_of(args.model, backend, args.context, args.tokens)
        first, step = (1e3 * statistics.median(x) for x in times)
        row = {"context": args.context, "first_token_ms": round(first), "step_ms": round(step, 2)}
        rows.append({"engine": name} | row)
        print(rows[-1], flush=True)
    result = {"machine": machine(), "rows": rows}
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
