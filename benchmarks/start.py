"""Seconds until an engine is ready: stock, measured at its first start, and its recipe found at later ones.

    python -m benchmarks.start --tokenizer FOLDER [--shape llama-3.1-8b] [--tensor-parallel-size 1]

Needs a GPU. Each start is a process of its own, in the order given, and all share a cache folder that is new.
vLLM is imported before the clock starts: that takes longer than all else, and differs by a second from
process to process. Weights are made up: they take the time of real ones in all but loading, which every
engine does alike. The recipe's digest tells whether two runs measured the same.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, load, save
from benchmarks.serve import ENGINES, SHAPES, ask_driver, fourier, settings
from fourier_vllm.evaluation.machine import commit, versions
from fourier_vllm.recipe import Recipe

MAX_MODEL_LEN = 32768
MEASURED = fourier(recipe="measured", target="balanced")
STOCK, AGAIN = ("stock", ENGINES["stock"]), ("fourier, measured before", MEASURED)
STARTS = (
    ("warm-up", fourier(recipe="weights", target="balanced")),  # reads files and compiles
    ("fourier, measured now", MEASURED),
    *(STOCK, AGAIN),
    *(STOCK, AGAIN),
    ("fourier, predicted", fourier(recipe="weights", target="balanced")),
    *(STOCK, AGAIN),
)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="folder")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--skip", type=int, default=0, help="of the starts, the first ones")
    parser.add_argument("--append", action="store_true", help="to the rows that are there")
    parser.add_argument("--memory", type=float, default=0.85, help="share of the GPU's memory")
    parser.add_argument("--out", type=Path, default=RESULTS / "start.json")
    return parser.parse_args()


def start(options: dict[str, Any], found: Any) -> None:
    """In a process of its own: start, and say how long that took and how many tokens fit."""
    from vllm import LLM

    begin = time.perf_counter()
    llm = LLM(**options)
    seconds = time.perf_counter() - begin
    tokens = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    found.put({"seconds": round(seconds, 2), "kv_tokens": tokens})
    llm.llm_engine.engine_core.shutdown()


def recipe_of(cache: Path) -> dict[str, Any]:
    """Digest of the layers of the recipe in the cache folder."""
    files = sorted(cache.glob("recipes/*.json"))
    if not files:
        return {}
    layers = re.sub(r"\s", "", str(Recipe.load(files[0]).layers))
    return {"recipe": hashlib.sha256(layers.encode()).hexdigest()[:12]}


def main() -> None:
    args = parse()
    args.model = None
    context = multiprocessing.get_context("spawn")
    rows = load(args.out) if args.append and args.out.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FOURIER_CACHE"] = str(Path(folder) / "cache")
        for name, engine in STARTS[args.skip :]:
            options = settings(args, "stock", MAX_MODEL_LEN, folder) | engine
            options |= {"skip_tokenizer_init": False, "tokenizer": args.tokenizer}
            found: Any = context.Queue()
            process = context.Process(target=start, args=(options, found))
            process.start()
            row = {"engine": name, "gpus": args.tensor_parallel_size, "shape": args.shape}
            row |= found.get(timeout=300)
            if engine == MEASURED:
                row |= recipe_of(Path(os.environ["FOURIER_CACHE"]))
            process.join()
            row |= {"gpu": ask_driver("name"), "commit": commit(), **versions("vllm", "triton")}
            print(row, flush=True)
            rows.append(row)
            save(args.out, rows)


if __name__ == "__main__":
    main()
