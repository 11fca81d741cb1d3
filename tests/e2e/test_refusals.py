"""A refusal is the last line on the screen, wherever it was found and with no weights to load."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support.refusals import FALCON, check_sentence
from tests.support.scheduling import LLAMA

# No recipe, and a projection that cannot be read: only the built layer shows it, in the engine's process.
UNREADABLE = dict(FALCON, alibi=False, new_decoder_architecture=False)


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        pytest.param(
            LLAMA,
            ["--kv-cache-dtype", "float16"],
            ["--kv-cache-dtype float16", "leave it out"],
            id="by-the-config",
        ),
        pytest.param(
            UNREADABLE,
            [],
            ["cannot be calibrated", "leave out --attention-backend fourier"],
            id="by-a-layer",
        ),
    ],
)
def test_last_on_the_screen(tmp_path, monkeypatch, model, options, words):
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    (tmp_path / "config.json").write_text(json.dumps(model))
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(tmp_path)]
    command += ["--attention-backend", "fourier", "--max-model-len", "512", "--enforce-eager"]
    command += ["--skip-tokenizer-init", "--kv-cache-memory-bytes", str(64 << 20), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    check_sentence(last.removeprefix("ValueError: "), *words)
    assert "No such file" not in done.stderr, "weights were looked for"
