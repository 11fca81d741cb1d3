"""A chat about a long text: every turn reads the turns before it from the prefix cache.

    python examples/multi_turn.py [--model MODEL]

Prefix hits are whole pages (128 tokens), so the last tokens before a turn are computed again. Without
`--model`: SmolLM2-135M-Instruct, fetched; it runs on a CPU too.
"""

from __future__ import annotations

import argparse

QUESTIONS = (
    "Which module is this text about?",
    "Name one function of it.",
    "What does that function return?",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Hugging Face folder or Hub id")
    args = parser.parse_args()

    import torch
    from vllm import LLM, SamplingParams

    from fourier_vllm.demo.fetch import fetch
    from fourier_vllm.evaluation.text import documents

    llm = LLM(
        args.model or str(fetch("smollm2")),
        attention_backend="fourier",
        max_model_len=8192,
        kv_cache_memory_bytes=256 << 20,
        enforce_eager=not torch.cuda.is_available(),  # compiling takes minutes on a CPU
    )
    greedy = SamplingParams(temperature=0, max_tokens=48)
    (text,) = documents(1, 12_000)  # characters of Python's manuals
    chat = [{"role": "system", "content": f"Answer questions about this text:\n{text[:12_000]}"}]
    for turn, question in enumerate(QUESTIONS, 1):
        chat.append({"role": "user", "content": question})
        (output,) = llm.chat(chat, greedy, use_tqdm=False)
        answer = output.outputs[0].text.strip()
        chat.append({"role": "assistant", "content": answer})
        prompt, cached = len(output.prompt_token_ids), output.num_cached_tokens
        print(f"turn {turn}: {prompt:,} prompt tokens, {cached:,} of them from the prefix cache")
        print(f"  {question} {answer}")


if __name__ == "__main__":
    main()
