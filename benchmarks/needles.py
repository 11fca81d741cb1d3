"""Needles through the real engine, stock attention and ours in one run.

    python benchmarks/needles.py [--model FOLDER] [--contexts 16] [--tokens 7000] [--options '{}' ...]

Every context is prefilled and cached first; its questions then read it from the prefix cache, which for
us means from sealed pages. Counts are exact matches of seven digits, greedy.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from fourier_vllm.evaluation.machine import commit, machine, versions

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")


def texts_of(args: argparse.Namespace) -> list[str]:
    """The contexts' texts; those of one Python's manuals can be taken to another machine."""
    from fourier_vllm.evaluation.text import documents

    if args.texts is not None and args.texts.exists():
        return json.loads(args.texts.read_text())[: args.contexts]
    texts = documents(args.contexts, 6 * args.tokens)
    if args.texts is not None:
        args.texts.write_text(json.dumps(texts))
    return texts


def score(model: str, fourier: dict[str, Any] | None, args: argparse.Namespace) -> dict[str, Any]:
    """Count right answers with one backend."""
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    from fourier_vllm.evaluation.engine_session import running
    from fourier_vllm.evaluation.needles import is_correct, needle_questions

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = texts_of(args)
    contexts = needle_questions(
        texts, lambda s: tokenizer(s, add_special_tokens=False).input_ids, args.tokens
    )
    settings: dict[str, Any] = {
        "model": model,
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_model_len": 8192,
        "max_num_batched_tokens": args.chunk,
        "kv_cache_memory_bytes": 1 << 30,
    }
    if DEVICE == "cuda":
        settings["kernel_config"] = {"enable_flashinfer_autotune": False}
    if fourier is not None:
        settings |= {"attention_backend": "fourier", "additional_config": {"fourier": fourier}}
    params = SamplingParams(temperature=0, max_tokens=8)
    right, total = 0, 0
    with running(settings) as llm:
        start = time.perf_counter()
        for questions in contexts:
            first = SamplingParams(max_tokens=1)
            llm.generate([{"prompt_token_ids": questions[0].ids}], first, use_tqdm=False)
            outputs = llm.generate(
                [{"prompt_token_ids": q.ids} for q in questions], params, use_tqdm=False
            )
            right += sum(
                is_correct(o.outputs[0].text, q.answer)
                for o, q in zip(outputs, questions, strict=True)
            )
            total += len(questions)
            print(f"  {right}/{total}", flush=True)
        capacity = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    return {
        "right": right,
        "questions": total,
        "kv_tokens": capacity,
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--contexts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=7000)
    parser.add_argument("--chunk", type=int, default=4096, help="max_num_batched_tokens")
    parser.add_argument(
        "--options",
        nargs="*",
        default=["{}"],
        help="of the backend, a JSON object a run; {}: all default",
    )
    parser.add_argument(
        "--texts", type=Path, help="JSON list of texts; written where it is missing"
    )
    parser.add_argument("--no-stock", action="store_true")
    parser.add_argument("--out", default=str(ROOT / "benchmarks/results/needles.json"))
    args = parser.parse_args()
    if args.model is None:
        from fourier_vllm.demo.fetch import fetch

        args.model = str(fetch("smollm2"))
    runs: list[tuple[str, dict[str, Any] | None]] = [] if args.no_stock else [("stock", None)]
    runs += [(f"fourier {options}", json.loads(options)) for options in args.options]
    rows: list[dict[str, Any]] = []
    result = {
        "machine": machine(DEVICE) | versions("vllm") | {"commit": commit()},
        "model": Path(args.model).name,
        "context_tokens": args.tokens,
        "max_num_batched_tokens": args.chunk,
        "rows": rows,
    }
    for name, fourier in runs:
        rows.append({"engine": name} | score(args.model, fourier, args))
        print(rows[-1], flush=True)
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
