"""Checkpoints with a KV cache scheme are served like the same weights without it."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.test_kv_scheme import FORMATS
from tests.support.engine import LOSSLESS, engine, generate, prompts, tokens

SCALE = 7.0  # applied anywhere, it would change every token
DTYPE = dict(dtype="bfloat16")


def with_scheme(toy, folder, name):
    """A copy of a toy model that asks for an fp8 cache and brings scales for it."""
    shutil.copytree(toy, folder)
    config = json.loads((folder / "config.json").read_text())
    shape = (config["num_key_value_heads"], 1, 1) if name.endswith("heads") else (1,)
    weights = load_file(folder / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        for kind in "kv":
            scale = torch.full(shape, SCALE)
            weights[f"model.layers.{layer}.self_attn.{kind}_scale"] = scale
        if name.endswith("heads"):
            weights[f"model.layers.{layer}.self_attn.q_scale"] = torch.full((4, 1, 1), SCALE)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": FORMATS[name]}))
    return folder


@pytest.fixture(scope="module")
def expected(toy):
    """Answers of the same weights without a scheme; stock vLLM begins with the same tokens."""
    with engine(toy("llama"), **DTYPE) as llm:
        stock = tokens(generate(llm, prompts(), 5))
    with engine(toy("llama"), LOSSLESS, **DTYPE) as llm:
        ours = tokens(generate(llm, prompts(), 40))
    assert [x[:5] for x in ours] == stock
    return ours


@pytest.mark.parametrize("name", ["compressed-tensors", "compressed-tensors-heads"])
def test_scales_are_loaded_and_not_applied(toy, tmp_path, expected, name):
    with engine(with_scheme(toy("llama"), tmp_path / name, name), LOSSLESS, **DTYPE) as llm:
        assert tokens(generate(llm, prompts(), 40)) == expected
        caches = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        layers = caches.compilation_config.static_forward_context.values()
        assert {x.kv_cache_dtype for x in layers if hasattr(x, "kv_cache_dtype")} == {"bfloat16"}
