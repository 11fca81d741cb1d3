"""Engines side by side through vLLM: KV capacity, time to first token, decode steps, throughput, memory.

    python -m benchmarks.serve [--model FOLDER] [--engines stock fourier ...]

Needs a GPU. Engines run one after the other, each in a process of its own, with the same prompts of random
tokens in the same share of the GPU's memory, prefix caching off. Without `--model`: the shape of Llama-3.1-8B
(or `--shape`) with made-up weights.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, load, save
from fourier_vllm.evaluation.machine import commit, versions

COMMON = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": COMMON
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "qwen3-8b": COMMON
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
}


def fourier(**options: str) -> dict[str, Any]:
    """Options of an engine with the backend. Made-up weights have no measured recipe: the target is named."""
    return {"attention_backend": "fourier", "additional_config": {"fourier": options}}


ENGINES: dict[str, dict[str, Any]] = {
    "stock": {"attention_backend": "FLASH_ATTN"},
    "fourier": fourier(target="balanced"),
    "fourier quality": fourier(target="quality"),
    "fourier exact": fourier(target="balanced", prefill="exact"),
    "fp8": {"attention_backend": "FLASH_ATTN", "kv_cache_dtype": "fp8"},
    "turboquant": {"kv_cache_dtype": "turboquant_4bit_nc"},
}
CONTEXTS = {4096: [4096], 32768: [1024, 8192, 32768], 131072: [131072]}  # by max_model_len
FIT = "fit"  # a batch of as many requests of max_model_len as the cache holds
TOGETHER = 64  # steps in which all requests of a batch decode
REPEATED = 65536  # prompt tokens of a case, at least: short ones run several times, eight at most
CHUNK = 8192  # tokens of a step
MAX_SEQS = 160


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder; default: made-up weights of a shape")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument(
        "--max-model-lens", nargs="+", type=int, choices=CONTEXTS, default=list(CONTEXTS)
    )
    parser.add_argument("--batches", nargs="*", default=["1", "8", "32", FIT])
    parser.add_argument("--max-prefill", type=int, default=5 << 20, help="prompt tokens of a batch")
    parser.add_argument("--append", action="store_true", help="to the rows that are there")
    parser.add_argument("--memory", type=float, default=0.85, help="share of the GPU's memory")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "serve.json")
    return parser.parse_args()


def settings(
    args: argparse.Namespace, engine: str, max_model_len: int, folder: str
) -> dict[str, Any]:
    """Options of `LLM`."""
    model = args.model
    if model is None:
        model = folder
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[args.shape]))
    return {
        "model": model,
        "load_format": "auto" if args.model else "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": max_model_len,
        "max_num_batched_tokens": CHUNK,
        "max_num_seqs": MAX_SEQS,
        "gpu_memory_utilization": args.memory,
        "tensor_parallel_size": args.tensor_parallel_size,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        "kernel_config": {"enable_flashinfer_autotune": False},
        **ENGINES[engine],
    }


def ask_driver(what: str) -> str:
    """A property of the first GPU; asking torch would take memory there."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits", "-i", gpu]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def cases(
    args: argparse.Namespace, max_model_len: int, kv_tokens: int
) -> Iterator[tuple[int, int, bool]]:
    """Contexts, batches, and whether a batch is as large as fits."""
    for context in CONTEXTS[max_model_len]:
        fit = min(kv_tokens // context, MAX_SEQS)
        largest = min(fit, args.max_prefill // context)
        sizes = {int(x): False for x in args.batches if x != FIT and int(x) <= largest}
        if FIT in args.batches and context == max_model_len:
            sizes[largest] = largest == fit
        for batch, is_fit in sizes.items():
            yield context, batch, is_fit


def preemptions(llm: Any) -> int:
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")


def greedy(new: int) -> Any:
    """Sampling of exactly `new` tokens, each handed out when it is there."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0,
        max_tokens=new,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def run_batch(llm: Any, context: int, batch: int, seed: int) -> tuple[list[float], list[float]]:
    """Requests that end at `context` tokens, all sent at once.

    Returns
    -------
    tuple of list of float
        Seconds to each request's first token, and of every step in which all of them decode.
    """
    # The first ones decode while the others are prefilled.
    new = min(TOGETHER + 16 + -(-batch * context // CHUNK), context // 2)
    params = greedy(new)
    rng = random.Random(f"{context} {batch} {seed}")
    prompts = [[rng.randrange(1000, 30000) for _ in range(context - new)] for _ in range(batch)]
    engine = llm.llm_engine
    for i, ids in enumerate(prompts):
        engine.add_request(f"{context}-{batch}-{seed}-{i}", {"prompt_token_ids": ids}, params)
    begin = last = time.perf_counter()
    first: dict[str, float] = {}
    steps: list[float] = []
    all_before = False
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            first.setdefault(output.request_id, now - begin)
        is_all = len(outputs) == batch
        if is_all and all_before:
            steps.append(now - last)
        if outputs:
            last, all_before = now, is_all
    return list(first.values()), steps


def measure(llm: Any, context: int, batch: int) -> dict[str, Any]:
    """Medians over the runs of one case."""
    before = preemptions(llm)
    repeats = max(1, min(8, REPEATED // (batch * context)))
    runs = [run_batch(llm, context, batch, seed) for seed in range(repeats)]
    steps = [step for _, run in runs for step in run]
    step = statistics.median(steps)
    low, *_, high = statistics.quantiles(steps, n=10)
    return {
        "context": context,
        "batch": batch,
        "runs": repeats,
        "ttft_ms": round(1e3 * statistics.median(t for times, _ in runs for t in times), 1),
        "all_first_tokens_ms": round(1e3 * statistics.median(max(t) for t, _ in runs), 1),
        "itl_ms": round(1e3 * step, 3),
        "itl_spread_ms": round(1e3 * (high - low), 3),
        "steps": len(steps),
        "output_tok_s": round(batch / step, 1),
        "preemptions": preemptions(llm) - before,
    }


def run_engine(args: argparse.Namespace, engine: str, max_model_len: int, rows: Any) -> None:
    """All cases of one engine; a row is sent as soon as it is measured."""
    from fourier_vllm.evaluation.engine_session import running

    with tempfile.TemporaryDirectory() as folder:
        options = settings(args, engine, max_model_len, folder)
        begin = time.perf_counter()
        with running(options) as llm:
            start = time.perf_counter() - begin
            kv_tokens = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
            shared = {
                "engine": engine,
                "max_model_len": max_model_len,
                "gpus": args.tensor_parallel_size,
                "kv_tokens": kv_tokens,
                "start_s": round(start, 1),
            }
            rows.put(shared)
            if args.batches:
                measure(llm, 1024, 4)  # what is compiled or allocated on first use
            for context, batch, is_fit in cases(args, max_model_len, kv_tokens):
                row = shared | measure(llm, context, batch)
                used = float(ask_driver("memory.used")) / 1024
                rows.put(row | {"fit": is_fit, "peak_gib": round(used, 2)})


def rows_of(process: Any, rows: Any) -> Iterator[dict[str, Any]]:
    """What a process sends, until it has ended and all of it is here."""
    while process.is_alive() or not rows.empty():
        try:
            yield rows.get(timeout=0.2)
        except queue.Empty:
            continue


def main() -> None:
    args = parse()
    done = load(args.out) if args.append and args.out.exists() else []
    about = {
        "model": args.model or f"{args.shape} shape, made-up weights",
        "gpu": ask_driver("name"),
        "commit": commit(),
        **versions("vllm", "triton"),
    }

    def add(row: dict[str, Any]) -> None:
        print(row, flush=True)
        done.append(row | about)
        save(args.out, done)

    spawn = multiprocessing.get_context("spawn")
    for max_model_len in args.max_model_lens:
        for engine in args.engines:
            rows = spawn.Queue()
            process = spawn.Process(target=run_engine, args=(args, engine, max_model_len, rows))
            process.start()
            for row in rows_of(process, rows):
                add(row)
            if process.exitcode:
                error = f"ended with exit code {process.exitcode}"
                add({"engine": engine, "max_model_len": max_model_len, "error": error})


if __name__ == "__main__":
    main()
