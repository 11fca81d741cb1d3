"""Speed of the CPU path against stock CPU attention: first token and decode steps at one context length.

    python -m benchmarks.cpu [--context 2000] [--tokens 64] [--model FOLDER]

Both engines run in this process, one after the other, with the same prompts; medians.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, measured_on, save, small_model

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")


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
    parser.add_argument("--model", help="folder; default: SmolLM2-135M-Instruct, fetched")
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu.json")
    args = parser.parse_args()
    model = args.model or small_model()
    rows = []
    for name, backend in (("stock", None), ("fourier", "fourier")):
        times = times_of(model, backend, args.context, args.tokens)
        first, step = (1e3 * statistics.median(x) for x in times)
        row = {"context": args.context, "first_token_ms": round(first), "step_ms": round(step, 2)}
        rows.append({"engine": name} | row)
        print(rows[-1], flush=True)
    save(args.out, {"machine": measured_on("cpu", "vllm"), "rows": rows})


if __name__ == "__main__":
    main()
