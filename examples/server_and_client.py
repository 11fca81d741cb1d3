"""Start `vllm serve` with the plugin, and stream an answer from it with the OpenAI client.

    python examples/server_and_client.py [--model MODEL]

The same server from a shell: `vllm serve MODEL --attention-backend fourier`. Without `--model`:
SmolLM2-135M-Instruct, fetched; it runs on a CPU too.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="Hugging Face folder")
    parser.add_argument("--log", type=Path, default=Path("vllm.log"), help="of the server")
    args = parser.parse_args()

    import torch

    from fourier_vllm.demo.fetch import fetch
    from fourier_vllm.demo.server import Server

    arguments = ["--attention-backend", "fourier", "--served-model-name", "example"]
    arguments += ["--max-model-len", "8192", "--kv-cache-memory-bytes", "256M"]
    if not torch.cuda.is_available():
        arguments.append("--enforce-eager")  # compiling takes minutes on a CPU
    # The server takes a free port of this machine and ends with the block.
    with Server(args.model or fetch("smollm2"), arguments, args.log) as server:
        ask(server.url, "Name three colours of the rainbow.")


def ask(url: str, question: str) -> None:
    """Print the answer as it arrives, and what it took."""
    from openai import DefaultHttpxClient, OpenAI

    direct = DefaultHttpxClient(trust_env=False)  # no proxy on the way to this machine
    client = OpenAI(base_url=f"{url}/v1", api_key="none", http_client=direct)
    stream = client.chat.completions.create(
        model="example",
        messages=[{"role": "user", "content": question}],
        max_tokens=48,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    print(question)
    for event in stream:
        if event.choices:
            print(event.choices[0].delta.content or "", end="", flush=True)
        if event.usage:
            print(
                f"\n{event.usage.prompt_tokens} tokens read, {event.usage.completion_tokens} written"
            )


if __name__ == "__main__":
    main()
