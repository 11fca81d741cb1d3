"""Decode speed of the CPU path against stock CPU attention: median step time at one context length.

    .venv/bin/python benchmarks/decode_cpu.py [--context 2000] [--tokens 64] [--model FOLDER]

Both engines run in this process, one after the other, with the same prompt.
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


def step_times(model: str, backend: str | None, context: int, tokens: int) -> list[float]:
    """Seconds of each decode step of one request."""
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
    ids = [random.Random(i).randrange(100, 40000) for i in range(context)]
    params = SamplingParams(temperature=0, max_tokens=tokens, detokenize=False, ignore_eos=True)
    times = []
    with running(settings) as llm:
        engine = llm.llm_engine
        engine.add_request("0", {"prompt_token_ids": ids}, params)
        while engine.has_unfinished_requests():
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
    return times[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results/decode_cpu.json"))
    args = parser.parse_args()
    if args.model is None:
        from fourier_vllm.fetch import fetch

        args.model = str(fetch("smollm2"))
    rows = []
    for name, backend in (("stock", None), ("fourier", "fourier")):
        times = step_times(args.model, backend, args.context, args.tokens)
        ms = 1e3 * statistics.median(times)
        rows.append({"engine": name, "context": args.context, "step_ms": round(ms, 2)})
        print(f"{name:8s} {ms:7.1f} ms a token, {1e3 / ms:5.1f} tokens/s at {args.context} tokens")
    speed = rows[0]["step_ms"] / rows[1]["step_ms"]
    print(f"fourier runs at {speed:.2f}x of stock")
    result = {"machine": machine(), "speed_against_stock": round(speed, 3), "rows": rows}
    Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
