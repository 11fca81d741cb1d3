"""Prefill in one engine and decode in another, NIXL between them: tokens of one stock engine."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import LOSSLESS, engine, generate, prompts, tokens

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None, reason="needs nixl, whose wheels are made for CUDA"
)
HITS = sum((len(x) - 1) // 32 * 32 for x in prompts())  # of an engine that has nothing
SHARED = 192  # tokens of three prompts, in whole pages: pulled once
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def stock(toy):
    with engine(toy()) as llm:
        return tokens(generate(llm, prompts(), 40))


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def run(
    root: Path,
    folder: Path,
    model: Path,
    prefill: dict[str, Any],
    decode: dict[str, Any],
    module: str = "tests.support.apart",
    **options: Any,
) -> tuple[dict[str, Any] | None, str]:
    """What the decoding engine found, None if it failed, and what it logged."""

    def start(role: str, fourier: dict[str, Any]) -> subprocess.Popen[str]:
        settings = {"fourier": fourier, "options": options, "port": free_port()}
        name = module if role == "decode" else "tests.support.apart"
        return subprocess.Popen(
            [sys.executable, "-m", name, role, str(model), str(folder), json.dumps(settings)],
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    first, second = start("prefill", prefill), start("decode", decode)
    try:
        said, _ = second.communicate(timeout=300)
        (folder / "done").touch()
        of_first, _ = first.communicate(timeout=60)
    finally:
        first.kill()
        second.kill()
    assert first.returncode == 0, of_first[-3000:]
    out = folder / "out.json"
    return json.loads(out.read_text()) if out.exists() else None, said


@pytest.mark.parametrize(
    ("fourier", "options", "pulled"),
    [
        pytest.param({}, {}, HITS - 2 * SHARED, id="prefix-cache"),
        pytest.param({}, {"enable_prefix_caching": False}, HITS, id="no-prefix-cache"),
        pytest.param({"prefill": "exact"}, {}, HITS - 2 * SHARED, id="exact"),
        pytest.param(
            {"sink_tokens": 32, "local_block_size": 8},
            {},
            HITS - 2 * SHARED,
            id="two-pinned-blocks",
        ),
    ],
)
def test_tokens_equal_stock(root, toy, tmp_path, stock, fourier, options, pulled):
    lossless = LOSSLESS | fourier
    found, said = run(root, tmp_path, toy(), lossless, lossless, **options)
    assert found is not None, said[-3000:]
    assert found["tokens"] == stock
    assert found["pulled"] == pulled


def test_wrong_rows_are_noticed(root, toy, tmp_path, stock):
    """Negative control."""
    wrong = "tests.support.wrong_rows"
    found, said = run(root, tmp_path, toy(), LOSSLESS, LOSSLESS, module=wrong)
    assert found is not None, said[-3000:]
    assert found["tokens"] != stock


@pytest.mark.parametrize(
    "decode", [{"target": "balanced"}, {"sink_tokens": 0}, {"page_size": 64, "local_window": 80}]
)
def test_another_format_is_refused(root, toy, tmp_path, decode):
    """The handshake tells the formats apart, and the request fails: no page is read as what it is not."""
    found, said = run(root, tmp_path, toy(), LOSSLESS, LOSSLESS | decode)
    assert "compatibility hash mismatch" in said, said[-3000:]
    if found is not None:
        long = [
            reason for ids, reason in zip(prompts(), found["reasons"], strict=True) if len(ids) > 64
        ]
        assert set(long) == {"error"}
