"""Needles and KV capacity of engines as a user starts them, stock attention and ours in one run.

    python -m benchmarks.needles [--model FOLDER] [--contexts 16] [--tokens 7000 ...] [--options '{}' ...]

Every context is prefilled and cached first; its questions then read it from the prefix cache, which for
the plugin means from sealed pages. Counts are exact matches of seven digits, greedy.

`fourier-vllm eval --engine --tasks multikey` compares named recipes. This benchmark takes any options of the
backend, `{}` for the defaults too, and records the KV tokens that an engine reports in 1 GiB.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS, load, measured_on, save, small_model
from fourier_vllm.evaluation.needles import WORDS, is_correct
from fourier_vllm.evaluation.text import documents

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")


@dataclass(frozen=True)
class Question:
    """A prompt of token ids and the digits it should be continued with."""

    ids: list[int]
    answer: str


def needle_questions(
    documents: list[str],
    encode: Callable[[str], list[int]],
    context_tokens: int,
    needles: int = 4,
    seed: int = 0,
) -> list[list[Question]]:
    """Contexts with `needles` questions each, one context a document.

    Parameters
    ----------
    documents : list of str
        Each longer than `context_tokens` tokens.
    encode : callable
        Text to token ids, without special tokens.
    context_tokens : int
        Tokens of the context; the question adds about 50.

    Returns
    -------
    list of list of Question
        Questions of one context share its tokens as a prefix.
    """
    rng = random.Random(seed)
    contexts = []
    for document in documents:
        words = rng.sample(WORDS, needles)
        numbers = [str(rng.randint(1_000_000, 9_999_999)) for _ in words]
        # Cut at the wanted length with room for the needles, then hide them between lines.
        share = (context_tokens - 40 * needles) / len(encode(document))
        lines = document[: int(len(document) * share)].split("\n")
        places = sorted(rng.sample(range(len(lines) // 40, len(lines) - 1), needles), reverse=True)
        for place, word, number in zip(places, words, numbers, strict=True):
            lines.insert(place, f"One of the special magic numbers for {word} is: {number}.")
        context = encode("\n".join(lines))[:context_tokens]
        contexts.append(
            [
                Question(
                    context
                    + encode(
                        f"\n\nQuestion: what is the special magic number for {word} mentioned in "
                        f"the text above?\nAnswer: One of the special magic numbers for {word} is: "
                    ),
                    number,
                )
                for word, number in zip(words, numbers, strict=True)
            ]
        )
    return contexts


def texts_of(args: argparse.Namespace) -> list[str]:
    """The contexts' texts; those of one Python's manuals can be taken to another machine."""
    if args.texts is not None and args.texts.exists():
        return load(args.texts)[: args.contexts]
    texts = documents(args.contexts, 6 * max(args.tokens))
    if args.texts is not None:
        args.texts.write_text(json.dumps(texts))
    return texts


def score(
    model: str, fourier: dict[str, Any] | None, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Count right answers with one backend, a row for each length of the contexts."""
    from transformers import AutoTokenizer

    from fourier_vllm.evaluation.engine_session import running

    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = texts_of(args)
    settings: dict[str, Any] = {
        "model": model,
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_model_len": max(8192, max(args.tokens) + 256),
        "max_num_batched_tokens": args.chunk,
        "kv_cache_memory_bytes": 1 << 30,
    }
    if DEVICE == "cuda":
        settings["kernel_config"] = {"enable_flashinfer_autotune": False}
    settings |= args.engine
    if fourier is not None:
        settings |= {"attention_backend": "fourier", "additional_config": {"fourier": fourier}}
    rows = []
    with running(settings) as llm:
        capacity = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
        for tokens in args.tokens:
            start = time.perf_counter()
            contexts = needle_questions(
                texts, lambda s: tokenizer(s, add_special_tokens=False).input_ids, tokens
            )
            right = [answered(llm, questions) for questions in contexts]
            row = {"context_tokens": tokens, "right": sum(right)}
            row |= {"questions": sum(map(len, contexts)), "kv_tokens": capacity}
            rows.append(row | {"seconds": round(time.perf_counter() - start, 1)})
    return rows


def answered(llm: Any, questions: list[Question]) -> int:
    """How many questions of one context were answered with the right digits."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": question.ids} for question in questions]
    llm.generate(prompts[:1], SamplingParams(max_tokens=1), use_tqdm=False)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    texts = [output.outputs[0].text for output in outputs]
    return sum(is_correct(text, q.answer) for text, q in zip(texts, questions, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder; default: SmolLM2-135M-Instruct, fetched")
    parser.add_argument("--contexts", type=int, default=16)
    parser.add_argument("--tokens", nargs="+", type=int, default=[7000])
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
    parser.add_argument(
        "--engine", type=json.loads, default={}, help="arguments of every engine, a JSON object"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "needles.json")
    args = parser.parse_args()
    args.model = args.model or small_model()
    runs: list[tuple[str, dict[str, Any] | None]] = [] if args.no_stock else [("stock", None)]
    runs += [(f"fourier {options}", json.loads(options)) for options in args.options]
    rows: list[dict[str, Any]] = []
    result = {
        "machine": measured_on(DEVICE, "vllm"),
        "model": Path(args.model).name,
        "engine": args.engine,
        "max_num_batched_tokens": args.chunk,
        "rows": rows,
    }
    for name, fourier in runs:
        for row in score(args.model, fourier, args):
            rows.append({"engine": name} | row)
            print(rows[-1], flush=True)
        save(args.out, result)


if __name__ == "__main__":
    main()
