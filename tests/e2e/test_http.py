"""The commands users know, against a real server: a chat of 6,000 tokens at the default target."""

from __future__ import annotations

import random
import re

import pytest
import requests

from fourier_vllm.demo.server import Server
from fourier_vllm.evaluation.text import documents
from tests.support.openai_client import openai_client

NEEDLE = "IMPORTANT: the secret password is 'bluebird'."
QUESTION = "What is the secret password?"


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    log = tmp_path_factory.mktemp("http") / "server.log"
    arguments = [
        *("--attention-backend", "FouRier"),
        *("--served-model-name", "smollm2"),
        *("--max-model-len", "8192"),
        *("--max-num-batched-tokens", "2048"),
        *("--kv-cache-memory-bytes", "256M"),
        "--enforce-eager",
    ]
    with Server(smollm2, arguments, log) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai_client(server.url, 600)


@pytest.fixture(scope="module")
def question(smollm2):
    """A chat of about 6,000 tokens with the needle early in it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer(documents(1, 40_000)[0]).input_ids[:5900]
    text = f"{tokenizer.decode(ids[:700])}\n\n{NEEDLE}\n\n{tokenizer.decode(ids[700:])}"
    return [{"role": "user", "content": f"{text}\n\n{QUESTION}"}]


def test_needle_in_a_long_chat(client, question):
    answer = client.chat.completions.create(
        model="smollm2", messages=question, max_tokens=24, temperature=0
    )
    assert answer.usage.prompt_tokens > 5900
    assert "bluebird" in answer.choices[0].message.content


def test_streaming_gives_the_same_answer(client, question):
    common = dict(model="smollm2", messages=question, max_tokens=24, temperature=0)
    whole = client.chat.completions.create(**common).choices[0].message.content
    parts = client.chat.completions.create(**common, stream=True)
    streamed = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
    assert streamed == whole


def test_many_clients_and_a_second_turn(client):
    from concurrent.futures import ThreadPoolExecutor

    def chat(seed: int) -> str:
        city = random.Random(seed).choice(["Germany", "Japan"])
        messages = [{"role": "user", "content": f"What is the capital of {city}?"}]
        for _ in range(2):
            reply = client.chat.completions.create(
                model="smollm2", messages=messages, max_tokens=12, temperature=0
            )
            content = reply.choices[0].message.content
            messages += [
                {"role": "assistant", "content": content},
                {"role": "user", "content": "Say that again."},
            ]
        return messages[1]["content"]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(chat, range(16)))
    assert all(any(x in a for x in ("Berlin", "Tokyo")) for a in answers)


def test_log_says_what_was_gained(server):
    log = server.log.read_text()
    (line,) = re.findall(r"fourier: recipe .*", log)
    assert "balanced" in line
    ours = int(re.search(r"KV cache size: ([\d,]+) tokens", log)[1].replace(",", ""))
    stock = (256 << 20) // (2 * 30 * 3 * 64 * 2)
    assert ours > 3.5 * stock


def test_metrics(server):
    session = requests.Session()
    session.trust_env = False
    metrics = session.get(f"{server.url}/metrics", timeout=30).text
    assert "vllm:kv_cache_usage_perc" in metrics
