"""Spawned engine and worker processes, tensor and data parallel, torch.compile, vLLM's bench commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.engine import LOSSLESS, engine, generate, generate_on_replicas, prompts, tokens

# Runs in a process of its own; arguments: model, fourier options or null, further options, result file.
SCRIPT = """
import json, sys
from tests.support.engine import engine, generate, prompts, tokens

if __name__ == "__main__":
    model, fourier, options, out = sys.argv[1:]
    with engine(model, json.loads(fourier), **json.loads(options)) as llm:
        json.dump(tokens(generate(llm, prompts()[2:], 40)), open(out, "w"))
"""


@pytest.fixture(scope="module")
def stock(toy):
    with engine(toy()) as llm:
        return tokens(generate(llm, prompts()[2:], 40))


def run(root: Path, folder: Path, model: Path, environment: dict[str, str], **options):
    script, out = folder / "script.py", folder / "out.json"
    script.write_text(SCRIPT)
    arguments = [str(model), json.dumps(LOSSLESS), json.dumps(options), str(out)]
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=os.environ | {"PYTHONPATH": str(root)} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(out.read_text())


def test_spawned_engine(root, tmp_path, toy, stock):
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    assert run(root, tmp_path, toy(), environment) == stock


def test_tensor_parallel(root, tmp_path, toy, stock):
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    assert run(root, tmp_path, toy(), environment, tensor_parallel_size=2) == stock


def test_data_parallel(toy, stock, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert generate_on_replicas(toy(), LOSSLESS, prompts()[2:], 40) == stock


def test_compiled(toy, stock):
    with engine(toy(), LOSSLESS, enforce_eager=False) as llm:
        assert tokens(generate(llm, prompts()[2:], 40)) == stock


@pytest.mark.parametrize("command", ["throughput", "latency"])
def test_vllm_bench(smollm2, command):
    arguments = ["--model", str(smollm2), "--attention-backend", "fourier", "--enforce-eager"]
    arguments += ["--max-model-len", "2048", "--kv-cache-memory-bytes", "256M"]
    if command == "throughput":
        arguments += ["--dataset-name", "random", "--num-prompts", "2"]
        arguments += ["--random-input-len", "300", "--random-output-len", "8"]
    else:
        arguments += ["--input-len", "300", "--output-len", "8", "--batch-size", "2"]
        arguments += ["--num-iters", "1", "--num-iters-warmup", "1"]
    result = subprocess.run(
        [str(Path(sys.executable).with_name("vllm")), "bench", command, *arguments],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "fourier: recipe" in result.stdout + result.stderr


def test_llm_class_in_any_case(toy):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    with engine(toy(), LOSSLESS, attention_backend="Fourier") as llm:
        config = llm.llm_engine.vllm_config
        assert config.attention_config.backend is AttentionBackendEnum.FOURIER
