"""`fourier-vllm batch`: killed and started again, a prompt that is too long, no row lost or doubled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.ray_commands import fourier_vllm

REQUESTS = 48
BATCH = 8
# The model is surer of these answers, token by token by 0.7 nats, than a CPU's rounding can change.
CAPITALS = {"Russia": "Moscow", "Germany": "Berlin", "Japan": "Tokyo"}
TOO_LONG = 17  # in the third batch, between requests that have an answer


def requests() -> list[dict]:
    """Prompts and chats; one that does not fit the model."""
    made = []
    for i in range(REQUESTS):
        if i == TOO_LONG:
            made.append({"id": i, "prompt": "far too long " * 2000})
        elif i % 2:
            country = list(CAPITALS)[i % 3]
            chat = [{"role": "user", "content": f"What is the capital of {country}?"}]
            made.append({"id": f"{country} {i}", "messages": chat})
        else:
            made.append({"id": i, "prompt": f"{i}. The largest city of Japan is"})
    return made


@pytest.fixture
def start(tmp_path, smollm2, environment):
    """Starts the command; all of it is gone after the test."""
    source, output = tmp_path / "requests.jsonl", tmp_path / "output"
    source.write_text("".join(json.dumps(request) + "\n" for request in requests()))
    command = [fourier_vllm(), "batch", str(smollm2), "--input", str(source)]
    command += ["--output", str(output), "--batch-size", str(BATCH), "--max-tokens", "24", "--"]
    command += ["--max-model-len", "1024", "--kv-cache-memory-bytes", "128M", "--enforce-eager"]
    processes: list[subprocess.Popen] = []

    def start(log: Path) -> subprocess.Popen:
        with log.open("w") as stream:
            process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
                start_new_session=True,
            )
        processes.append(process)
        return process

    yield start
    for process in processes:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def whole(output: Path) -> list[Path]:
    """Files with the answers of a batch."""
    files = (output / "answers").glob("*.json")
    return sorted(file for file in files if file.read_bytes().count(b"\n") == BATCH)


def answers(output: Path) -> list[dict]:
    lines = [x for f in (output / "answers").glob("*.json") for x in f.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def wait(process: subprocess.Popen, log: Path) -> str:
    assert process.wait(240) == 0, log.read_text()[-3000:]
    return log.read_text()


def test_killed_and_started_again(start, tmp_path):
    output = tmp_path / "output"
    first = start(tmp_path / "first.log")
    deadline = time.monotonic() + 240
    while len(whole(output)) < 2:
        assert first.poll() is None, (tmp_path / "first.log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kill(first)
    time.sleep(5)  # Ray's processes follow the driver within seconds
    kept, torn = whole(output)[:2]
    assert len(whole(output)) < REQUESTS // BATCH
    before = kept.read_bytes()
    torn.write_bytes(torn.read_bytes()[:100])  # what a kill in the middle of a write leaves

    log = wait(start(tmp_path / "second.log"), tmp_path / "second.log")
    rows = {row["id"]: row for row in answers(output)}
    assert Counter(row["id"] for row in answers(output)) == Counter(
        str(request["id"]) for request in requests()
    )
    assert kept.read_bytes() == before
    assert not torn.exists()
    assert "1 lines went to" in log
    assert f"{REQUESTS} answers" in log
    assert "1 of them an error" in log
    assert [i for i, row in rows.items() if row["error"]] == [str(TOO_LONG)]
    assert "1024" in rows[str(TOO_LONG)]["error"]
    chats = [i for i in rows if not i.isdecimal()]
    assert len(chats) == REQUESTS // 2 - 1
    assert all(CAPITALS[i.split()[0]] in rows[i]["text"] for i in chats)
    assert all(row["output_tokens"] for i, row in rows.items() if i != str(TOO_LONG))

    # nothing left to do: neither Ray nor vLLM starts
    third = wait(start(tmp_path / "third.log"), tmp_path / "third.log")
    assert f"{REQUESTS} answered before" in third
    assert "Ray" not in third
