"""LoRA adapters beside each other: stock attention's tokens, and no page that another adapter wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.engine import LOSSLESS, engine, prompts

RANK = 8
# vLLM 0.32 on a CPU gives requests without an adapter the last slot's in a mixed batch: leave it empty.
LORA = dict(enable_lora=True, max_loras=3, max_lora_rank=RANK)
PAGE = LOSSLESS["page_size"]


def write_adapter(model: Path, path: Path, seed: int) -> str:
    """Random LoRA weights for every projection of `model`."""
    generator = torch.Generator().manual_seed(seed)
    tensors, names = {}, set()
    for key, weight in load_file(model / "model.safetensors").items():
        if not key.endswith("_proj.weight"):
            continue
        prefix = f"base_model.model.{key.removesuffix('.weight')}"
        names.add(prefix.rsplit(".", 1)[1])
        for part, shape in (("A", (RANK, weight.shape[1])), ("B", (weight.shape[0], RANK))):
            random = torch.randn(shape, generator=generator) * 0.15
            tensors[f"{prefix}.lora_{part}.weight"] = random
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    config = dict(peft_type="LORA", r=RANK, lora_alpha=2 * RANK, target_modules=sorted(names))
    (path / "adapter_config.json").write_text(json.dumps(config))
    return str(path)


def ask(llm: Any, ids: Sequence[list[int]], adapters: Sequence[Any]) -> list[Any]:
    """Tokens, and tokens found in the prefix cache; a request an element, all at once."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=24, detokenize=False, ignore_eos=True)
    outputs = llm.generate(
        [{"prompt_token_ids": x} for x in ids], params, lora_request=adapters, use_tqdm=False
    )
    return [(list(x.outputs[0].token_ids), x.num_cached_tokens) for x in outputs]


def conversation(llm: Any, model: Path, folder: Path) -> dict[str, Any]:
    """Answers of the model and of two adapters, and of one whose weights change."""
    from vllm.lora.request import LoRARequest

    a, b = (LoRARequest(x, i, write_adapter(model, folder / x, i)) for i, x in enumerate("ab", 1))
    prompt, found = prompts()[3], {}
    three = [None, a, b]
    found["first"] = ask(llm, [prompt] * 3, three)
    found["again"] = ask(llm, [prompt] * 3, three)
    turns = [prompt + answer + [7, 8, 9] for answer, _ in found["first"]]
    found["second turn"] = ask(llm, turns, three)
    found["another's turn"] = ask(llm, turns, [b, None, a])

    write_adapter(model, folder / "a", seed=3)
    found["reloaded"] = ask(llm, [prompt], [LoRARequest("a", 1, a.path, load_inplace=True)])
    moved = LoRARequest("a", 4, write_adapter(model, folder / "elsewhere", seed=3))
    found["moved"] = ask(llm, [prompt], [moved])
    llm.reset_prefix_cache()
    found["reset"] = ask(llm, [prompt], [a])
    return found


@pytest.fixture(scope="module")
def stock(toy, tmp_path_factory):
    with engine(toy(), block_size=PAGE, **LORA) as llm:
        return conversation(llm, toy(), tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def lossless(toy, tmp_path_factory):
    with engine(toy(), LOSSLESS, **LORA) as llm:
        return conversation(llm, toy(), tmp_path_factory.mktemp("adapters"))


def test_tokens_and_hits_equal_stock(stock, lossless):
    assert lossless == stock


def test_pages_know_their_adapter(lossless):
    """The same prompt hits only what the same adapter wrote."""
    answers = [tokens for tokens, _ in lossless["first"]]
    assert len({tuple(x) for x in answers}) == 3
    assert [tokens for tokens, _ in lossless["again"]] == answers
    hits = {when: [hit for _, hit in x] for when, x in lossless.items()}
    pages = len(prompts()[3]) // PAGE * PAGE
    assert hits["first"] == [0, 0, 0]
    assert hits["again"] == [pages] * 3
    # Of another's conversation only the prompt, which every one of them had.
    assert hits["another's turn"] == [pages] * 3 < hits["second turn"]


def test_changed_weights(lossless):
    """vLLM names pages by an adapter's name and path: weights that change in place meet the old pages."""
    (reloaded, hit), (moved, none), (reset, _) = (
        lossless[x][0] for x in ("reloaded", "moved", "reset")
    )
    assert hit > 0 == none
    assert moved == reset != reloaded != lossless["first"][1][0]


def test_recipe_from_the_weights(toy, tmp_path, stock):
    """It is the model's; adapters are served with it."""
    with engine(toy(), LOSSLESS | {"target": "balanced"}, **LORA) as llm:
        found = conversation(llm, toy(), tmp_path)
    hits = [[hit for _, hit in x] for x in found.values()]
    assert hits == [[hit for _, hit in x] for x in stock.values()]
