"""The main job on a small model: serve it, read a long text with it, report the memory."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from fourier_vllm.demo.fetch import fetch
from fourier_vllm.demo.server import Server
from fourier_vllm.files import cache_dir

MAX_MODEL_LEN = 8192
SERVED_NAME = "demo"
NEEDLE = "IMPORTANT: the secret password is 'bluebird'."  # a 135M model finds this one reliably
QUESTION = "What is the secret password?"
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Options:
    """What `fourier-vllm demo` was asked for."""

    model: Path | None = None
    attention_backend: str = "fourier"
    kv_cache_memory_bytes: str = "256M"
    context: int = 6000
    timeout: float = 600
    keep: bool = False
    vllm_args: list[str] = field(default_factory=list)


def run(options: Options) -> int:
    """Run the demonstration; returns the exit code."""
    folder = options.model or fetch()
    document = long_text(folder, options.context)
    log = cache_dir() / "demo.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with Server(folder, serve_arguments(options), log, options.timeout) as server:
        ask(server.url, document)
        print(memory_report(folder, server.url, options.attention_backend))
        if options.keep:
            print(invitation(server.url), flush=True)
            server.process.wait()
    return 0


def serve_arguments(options: Options) -> list[str]:
    """Arguments of `vllm serve` after the model folder."""
    import torch

    arguments = [
        *("--served-model-name", SERVED_NAME),
        *("--attention-backend", options.attention_backend),
        *("--max-model-len", str(MAX_MODEL_LEN)),
        *("--kv-cache-memory-bytes", options.kv_cache_memory_bytes),
    ]
    if not torch.cuda.is_available():
        arguments.append("--enforce-eager")  # compiling takes two minutes on a CPU
    return [*arguments, *options.vllm_args]


def long_text(folder: Path, tokens: int) -> str:
    """About `tokens` tokens of Python's own manuals with the needle in the first tenth."""
    from tokenizers import Tokenizer

    from fourier_vllm.evaluation.text import documents

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    (text,) = documents(1, 8 * tokens)
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:tokens]
    early = tokens // 10
    return f"{tokenizer.decode(ids[:early])}\n\n{NEEDLE}\n\n{tokenizer.decode(ids[early:])}"


def ask(url: str, document: str) -> None:
    """Send the text and the question; print the answer as it arrives."""
    from openai import DefaultHttpxClient, OpenAI

    print(f"\nhidden early in the text: {NEEDLE}\nasked: {QUESTION}\nanswer: ", end="", flush=True)
    client = OpenAI(
        base_url=f"{url}/v1",
        api_key="none",
        timeout=600,
        http_client=DefaultHttpxClient(trust_env=False),  # no proxy between us and loopback
    )
    start = time.monotonic()
    first = 0.0
    stream = client.chat.completions.create(
        model=SERVED_NAME,
        messages=[{"role": "user", "content": f"{document}\n\n{QUESTION}"}],
        max_tokens=ANSWER_TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for event in stream:
        if event.choices and event.choices[0].delta.content:
            first = first or time.monotonic() - start
            print(event.choices[0].delta.content, end="", flush=True)
        if event.usage:
            total = time.monotonic() - start
            print(
                f"\n{event.usage.prompt_tokens:,} prompt tokens read in {first:.1f} s, "
                f"{event.usage.completion_tokens} written in {total - first:.1f} s\n"
            )


def memory_report(folder: Path, url: str, backend: str) -> str:
    """What one token costs and how many fit, stock against what the server says of itself."""
    pool, tokens = server_capacity(url)
    plain = plain_bytes_per_token(folder)
    rows = [
        ("", "stock vLLM", backend),
        ("KV cache bytes per token", f"{plain:,}", f"{pool / tokens:,.0f}"),
        (f"tokens in {pool / 2**20:.0f} MiB of KV cache", f"{pool // plain:,}", f"{tokens:,}"),
        (
            f"requests of {MAX_MODEL_LEN:,} tokens",
            *(f"{n / MAX_MODEL_LEN:.1f}" for n in (pool // plain, tokens)),
        ),
    ]
    return "\n".join(f"{name:<36}{stock:>12}{ours:>12}" for name, stock, ours in rows)


def server_capacity(url: str) -> tuple[int, int]:
    """Bytes of the server's KV cache and the tokens that it says fit."""
    lines = read_metrics(url).splitlines()
    info = next(line for line in lines if line.startswith("vllm:cache_config_info{"))
    labels = dict(re.findall(r'(\w+)="([^"]*)"', info))
    return int(labels["kv_cache_memory_bytes"]), int(labels["kv_cache_size_tokens"])


def read_metrics(url: str) -> str:
    """The server's Prometheus metrics."""
    import requests

    session = requests.Session()
    session.trust_env = False
    return session.get(f"{url}/metrics", timeout=30).text


def plain_bytes_per_token(folder: Path) -> int:
    """Bytes of raw K and V per token, in the model's own type."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    # Without a dtype of its own vLLM serves a model in 16 bits.
    element = torch.empty((), dtype=config.dtype or torch.bfloat16).element_size()
    return 2 * config.num_hidden_layers * kv_heads * head_size * element


def invitation(url: str) -> str:
    """How to talk to a server that was left up."""
    body = f'{{"model": "{SERVED_NAME}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    return (
        f"\nserving at {url}/v1 until Ctrl-C; try\n"
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"
    )
