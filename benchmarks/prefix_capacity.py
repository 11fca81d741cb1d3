"""How much of the reported KV capacity the prefix cache keeps: chats one after the other, then each again.

    python -m benchmarks.prefix_capacity [--model FOLDER] [--shares .9] [--answers 8 300 2000]

Chats of 1,000 prompt tokens and an answer fill a share of the tokens that the engine reports; then every
chat comes back with three tokens more, in the same order. `found` is the share of the chats' full pages
that came from the prefix cache. Without `--model`: a small Llama with made-up weights, on any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS, measured_on, save

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE, PROMPT, VOCABULARY = 128, 1000, 500
SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
ENGINES: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "fourier": {},
    **{f"fourier {target}": {"target": target} for target in ("quality", "compact", "lossless")},
}


def chats_found(
    llm: Any, share: float, prompt_tokens: int, answer_tokens: int, page: int, seed: int = 0
) -> tuple[int, float]:
    """Fill the prefix cache with chats, then send each again.

    Returns
    -------
    tuple of int, float
        Chats, and the share of their full pages of `page` tokens that was found.
    """
    from vllm import SamplingParams

    def ask(ids: list[int], max_tokens: int) -> Any:
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        return llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)[0]

    assert llm.reset_prefix_cache()
    rng = random.Random(seed)
    capacity = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    chats = []
    for _ in range(max(1, int(share * capacity / (prompt_tokens + answer_tokens)))):
        prompt = [rng.randrange(3, VOCABULARY) for _ in range(prompt_tokens)]
        chats.append(prompt + list(ask(prompt, answer_tokens).outputs[0].token_ids))
    # The last token of an answer was never computed.
    whole = [(len(chat) - 1) // page * page for chat in chats]
    found = [ask([*chat, 7, 8, 9], 1).num_cached_tokens for chat in chats]
    return len(chats), sum(map(min, found, whole)) / sum(whole)


def main() -> None:
    from fourier_vllm.evaluation.engine_session import running

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder; default: a small model with made-up weights")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.9])
    parser.add_argument("--answers", nargs="+", type=int, default=[8, 300, 2000])
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--memory-mib", type=int, default=16, help="of the KV cache")
    parser.add_argument("--out", type=Path, default=RESULTS / "prefix_capacity.json")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    result = {"machine": measured_on(DEVICE, "vllm"), "rows": rows}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SMALL))
        for engine in args.engines:
            settings: dict[str, Any] = {
                "model": args.model or folder,
                "load_format": "auto" if args.model else "dummy",
                "skip_tokenizer_init": True,
                "dtype": "bfloat16",
                "enforce_eager": True,
                "max_model_len": args.max_model_len,
                "max_num_batched_tokens": 1024,
                "max_num_seqs": 4,
                "kv_cache_memory_bytes": args.memory_mib << 20,
            }
            if DEVICE == "cuda":
                settings["kernel_config"] = {"enable_flashinfer_autotune": False}
            fourier = ENGINES[engine]
            if fourier is not None:
                settings |= {
                    "attention_backend": "fourier",
                    "additional_config": {"fourier": fourier},
                }
            with running(settings) as llm:
                for share in args.shares:
                    for answer in args.answers:
                        chats, found = chats_found(llm, share, PROMPT, answer, PAGE)
                        rows.append(
                            {
                                "engine": engine,
                                "model": Path(args.model).name if args.model else "made-up",
                                "kv_tokens": llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens,
                                "share": share,
                                "answer_tokens": answer,
                                "chats": chats,
                                "found": round(found, 4),
                            }
                        )
                        print(rows[-1], flush=True)
                        save(args.out, result)


if __name__ == "__main__":
    main()
