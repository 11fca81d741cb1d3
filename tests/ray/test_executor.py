"""`--distributed-executor-backend ray`: the plugin in Ray's workers, tensor parallel across them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

RANKS = 3  # SmolLM2 has 9 query and 3 KV heads

# Runs in a process of its own; arguments: model, executor, ranks, result file.
SCRIPT = """
import json, sys
from tests.support import pretend
from tests.support.engine import engine, generate, prompts, tokens


def backend(worker):
    layers = worker.model_runner.compilation_config.static_forward_context.values()
    attention = [layer for layer in layers if hasattr(layer, "attn_backend")]
    return sorted({layer.attn_backend.get_name() for layer in attention})


if __name__ == "__main__":
    model, executor, ranks, out = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    if executor == "ray":
        pretend.start(ranks)
    options = dict(
        tensor_parallel_size=ranks, distributed_executor_backend=executor,
        max_num_batched_tokens=512, kv_cache_memory_bytes=256 << 20,
    )
    with engine(model, {}, **options) as llm:
        ids = [p * 2 for p in prompts()[2:5]]
        result = dict(
            executor=type(llm.llm_engine.model_executor).__name__,
            backends=llm.collective_rpc(backend),
            tokens=tokens(generate(llm, ids, 24)),
        )
    json.dump(result, open(out, "w"))
"""


@pytest.fixture
def run(root, tmp_path, smollm2, environment):
    def run(executor: str) -> dict:
        script, out = tmp_path / "script.py", tmp_path / f"{executor}.json"
        script.write_text(SCRIPT)
        result = subprocess.run(
            [sys.executable, str(script), str(smollm2), executor, str(RANKS), str(out)],
            env=environment
            | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return json.loads(out.read_text())

    return run


def test_tensor_parallel_over_ray_workers(run):
    ray, processes = run("ray"), run("mp")
    assert "Ray" in ray["executor"]
    assert "Ray" not in processes["executor"]
    assert ray["backends"] == processes["backends"] == [["FOURIER"]] * RANKS
    assert ray["tokens"] == processes["tokens"]
