"""`fourier-vllm deploy`: two replicas of SmolLM2 behind one OpenAI-compatible address."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from fourier_vllm.demo.server import free_port
from tests.support.openai_client import openai_client
from tests.support.ray_commands import fourier_vllm

# The model is surer of this answer than a CPU's rounding can change.
QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]


@pytest.fixture(scope="module")
def deployment(smollm2, environment, tmp_path_factory):
    """Port, process and log of a deployment that answers."""
    log, port = tmp_path_factory.mktemp("deploy") / "log", free_port()
    command = [fourier_vllm(), "deploy", str(smollm2), "--replicas", "2", "--port", str(port)]
    command += ["--", "--served-model-name", "smollm2", "--max-model-len", "1024"]
    command += ["--kv-cache-memory-bytes", "128M", "--enforce-eager"]
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment | {"RAY_DEDUP_LOGS": "0"},  # one line a replica
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 300
        while "serving at" not in log.read_text():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield port, process, log
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def client(deployment):
    return openai_client(f"http://127.0.0.1:{deployment[0]}", 120)


def ask(client) -> str:
    answer = client.chat.completions.create(
        model="smollm2", messages=QUESTION, max_tokens=12, temperature=0
    )
    return answer.choices[0].message.content


def test_many_clients(client):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(client), range(16)))
    assert all("Tokyo" in answer for answer in answers)


def test_streaming(client):
    stream = client.chat.completions.create(
        model="smollm2", messages=QUESTION, max_tokens=12, temperature=0, stream=True
    )
    assert "Tokyo" in "".join(x.choices[0].delta.content or "" for x in stream if x.choices)


def test_both_replicas_run_fourier_and_answer(client, deployment):
    for _ in range(8):
        ask(client)
    time.sleep(2)  # logs travel
    log = deployment[2].read_text()
    assert len(re.findall(r"fourier: recipe balanced", log)) == 2
    answered = re.findall(r"LLMServer:smollm2 pid=(\d+)\).*CALL chat OK", log)
    assert len(set(answered)) == 2


def test_ends_when_told_to(deployment):
    _, process, log = deployment
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, log.read_text()[-3000:]
