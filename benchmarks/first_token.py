"""Time to the first token of one short prompt, engines asked in turns.

    python -m benchmarks.first_token [--engines stock fourier] [--prompt 944] [--rounds 300]

Needs a GPU. The host's work dominates a short prompt, and the host's speed differs by half from one minute
and process to the next. So all engines run at once, share the GPU's memory, and answer one after the other,
the first one changing from round to round; a ratio compares two neighbours. With
VLLM_ENABLE_V1_MULTIPROCESSING=0 the engines share one thread too.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, load, save
from benchmarks.serve import ENGINES, SHAPES, ask_driver, greedy, settings
from fourier_vllm.evaluation.machine import commit, versions

WARM_UP = 10  # rounds
SHOWN = 20  # rounds a line of progress
MAX_MODEL_LEN = 4096
NEW = 4  # tokens: an engine prepares the second one's step before it hands out the first


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["stock", "fourier"])
    parser.add_argument("--model", help="folder; default: made-up weights of a shape")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--prompt", type=int, default=944, help="tokens")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--append", action="store_true", help="to the runs that are there")
    parser.add_argument("--memory", type=float, default=0.85, help="of the GPU's, all together")
    parser.add_argument("--out", type=Path, default=RESULTS / "first_token.json")
    return parser.parse_args()


def first_token(llm: Any, name: str, prompt: list[int]) -> float:
    """Milliseconds from the request to its first token; returns when the request has ended."""
    engine = llm.llm_engine
    begin = time.perf_counter()
    engine.add_request(name, {"prompt_token_ids": prompt}, greedy(NEW))
    first = None
    while engine.has_unfinished_requests():
        if engine.step() and first is None:
            first = time.perf_counter() - begin
    assert first is not None
    return 1e3 * first


def quartiles(x: list[float], digits: int) -> list[float]:
    return [round(q, digits) for q in statistics.quantiles(x, n=4)]


def main() -> None:
    from fourier_vllm.evaluation.engine_session import running

    args = parse()
    args.tensor_parallel_size, args.memory = 1, args.memory / len(args.engines)
    times: dict[str, list[float]] = {name: [] for name in args.engines}
    with ExitStack() as stack:
        llms = {}
        for name in args.engines:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            options = settings(args, name, MAX_MODEL_LEN, folder)
            llms[name] = stack.enter_context(running(options))
        rng = random.Random(0)
        for i in range(WARM_UP + args.rounds):
            prompt = [rng.randrange(1000, 30000) for _ in range(args.prompt)]
            order = args.engines if i % 2 else args.engines[::-1]
            for name in order:
                ms = first_token(llms[name], f"{name} {i}", prompt)
                if i >= WARM_UP:
                    times[name].append(ms)
            if i >= WARM_UP and (i - WARM_UP + 1) % SHOWN == 0:
                medians = (
                    f"{name} {statistics.median(x[-SHOWN:]):.1f}" for name, x in times.items()
                )
                print(f"rounds to {i - WARM_UP + 1}, ms:", *medians, flush=True)
    base = times[args.engines[0]]
    rows = []
    for name, found in times.items():
        ratios = [x / y for x, y in zip(found, base, strict=True)]
        row = {"engine": name, "ms_quartiles": quartiles(found, 2)}
        row["to_first_engine_quartiles"] = quartiles(ratios, 3)
        print(row, flush=True)
        rows.append(row)
    result = {
        "model": args.model or f"{args.shape} shape, made-up weights",
        "prompt": args.prompt,
        "rounds": args.rounds,
        "one_process": os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0",
        "gpu": ask_driver("name"),
        "commit": commit(),
        **versions("vllm", "triton"),
        "rows": rows,
    }
    runs = load(args.out) if args.append and args.out.exists() else []
    save(args.out, [*runs, result])


if __name__ == "__main__":
    main()
