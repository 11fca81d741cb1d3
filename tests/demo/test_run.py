"""The demonstration's parts that need no model, and once the whole of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fourier_vllm.demo import run as demo

METRICS = """# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
vllm:cache_config_info{block_size="128",kv_cache_memory_bytes="268435456",\
kv_cache_size_tokens="70000"} 1.0
"""


def test_memory_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = {"model_type": "llama", "hidden_size": 576, "head_dim": 64, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config | shape))
    monkeypatch.setattr(demo, "read_metrics", lambda url: METRICS)
    report = demo.memory_report(tmp_path, "http://nowhere", "fourier")
    assert [line.split()[-2:] for line in report.splitlines()] == [
        ["vLLM", "fourier"],
        ["23,040", "3,835"],
        ["11,650", "70,000"],
        ["1.4", "8.5"],
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 2 * 2 * 2 * 32 * 2),
        ({"head_dim": None}, 2 * 2 * 2 * 16 * 2),
        ({"head_dim": None, "num_key_value_heads": None}, 2 * 2 * 4 * 16 * 2),
        ({"dtype": "float32"}, 2 * 2 * 2 * 32 * 4),
        ({"dtype": None}, 2 * 2 * 2 * 32 * 2),
    ],
)
def test_bytes_of_any_model(tmp_path: Path, changes: dict, expected: int) -> None:
    """Many configurations leave out what follows from the rest."""
    config = {"model_type": "llama", "hidden_size": 64, "head_dim": 32, "dtype": "bfloat16"}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    kept = {key: value for key, value in (config | changes).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    assert demo.plain_bytes_per_token(tmp_path) == expected


@pytest.mark.e2e
def test_long_text(smollm2: Path) -> None:
    from tokenizers import Tokenizer

    text = demo.long_text(smollm2, 3000)
    assert 0 < text.index(demo.NEEDLE) < len(text) / 5
    tokens = len(Tokenizer.from_file(str(smollm2 / "tokenizer.json")).encode(text).ids)
    assert abs(tokens - 3000) < 100


@pytest.fixture(scope="module")
def stdout(smollm2: Path) -> str:
    """What `fourier-vllm demo` prints; it has ended its server when it returns."""
    command = [sys.executable, "-m", "fourier_vllm.cli", "demo"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.e2e
def test_demo_reports_a_smaller_cache(stdout: str) -> None:
    (tokens,) = (line for line in stdout.splitlines() if line.startswith("tokens in"))
    stock, ours = (int(number.replace(",", "")) for number in tokens.split()[-2:])
    assert ours > 3 * stock


@pytest.mark.e2e
def test_demo_finds_the_password(stdout: str) -> None:
    assert "bluebird" in stdout.split("answer:")[1]
