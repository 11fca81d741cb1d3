"""Ask a model about a long text, and see how many tokens its KV cache holds.

    python examples/offline.py [--model MODEL] [--recipe FILE]

Without `--model`: SmolLM2-135M-Instruct, fetched; it runs on a CPU too.
"""

from __future__ import annotations

import argparse

SECRET = "IMPORTANT: the secret password is 'bluebird'."
QUESTION = "What is the secret password?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Hugging Face folder or Hub id")
    parser.add_argument("--recipe", help="file of `fourier-vllm calibrate`; default: none is named")
    args = parser.parse_args()

    import torch
    from vllm import LLM, SamplingParams

    from fourier_vllm.demo.fetch import fetch
    from fourier_vllm.evaluation.text import documents

    # Without options the plugin takes the recipe that ships for the model, or predicts one.
    options = {"recipe": args.recipe} if args.recipe else {}
    llm = LLM(
        args.model or str(fetch("smollm2")),
        attention_backend="fourier",
        additional_config={"fourier": options},
        max_model_len=8192,
        kv_cache_memory_bytes=256 << 20,
        enforce_eager=not torch.cuda.is_available(),  # compiling takes minutes on a CPU
    )
    (text,) = documents(1, 20_000)  # characters of Python's manuals
    prompt = f"{text[:2000]}\n\n{SECRET}\n\n{text[2000:20_000]}\n\n{QUESTION}"
    greedy = SamplingParams(temperature=0, max_tokens=32)
    (output,) = llm.chat([{"role": "user", "content": prompt}], greedy)

    tokens = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    print(f"read {len(output.prompt_token_ids):,} tokens; the KV cache holds {tokens:,} in 256 MiB")
    print(f"{QUESTION} {output.outputs[0].text.strip()}")


if __name__ == "__main__":
    main()
