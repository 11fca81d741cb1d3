"""Toy models through transformers' code: `python -m tests.support.through_transformers FOLDER`.

A process of its own: vLLM changes transformers' classes for good.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import transformers

from fourier_vllm.calibration.hf_model import fingerprint_of
from fourier_vllm.recipe import target_recipe
from tests.support.engine import LOSSLESS, conversation, engine
from tests.support.toys import add_tokenizer, make_toy


def recipe_options(model: Path, file: Path) -> dict[str, Any]:
    """Options that name a lossless recipe made for `model` as calibration makes one."""
    fingerprint = fingerprint_of(transformers.AutoModelForCausalLM.from_pretrained(model))
    target_recipe(fingerprint, "lossless", LOSSLESS["page_size"]).save(file)
    sizes = {name: LOSSLESS[name] for name in ("local_window", "sink_tokens")}
    return sizes | {"recipe": str(file)}


def main(folder: Path) -> None:
    results: dict[str, Any] = {}

    def run(name: str, model: Path, fourier: dict[str, Any] | None, **options: Any) -> None:
        with engine(model, fourier, model_impl="transformers", **options) as llm:
            runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
            assert type(runner.model).__name__ == "TransformersForCausalLM"
            results[f"{model.name} {name}"] = conversation(llm, max_tokens=12)

    llama, gemma3 = make_toy(folder, "llama"), make_toy(folder, "gemma3")
    recipe = recipe_options(llama, folder / "recipe.json")
    for model in (llama, gemma3):
        run("stock", model, None)
        run("lossless", model, LOSSLESS)
    run("recipe", llama, recipe)
    os.environ["FOURIER_CACHE"] = str(folder / "cache")
    measured = LOSSLESS | {"target": "quality", "recipe": "measured"}
    run("measured", add_tokenizer(llama), measured, skip_tokenizer_init=False)
    (file,) = folder.glob("cache/recipes/*.json")
    run("measured, from its file", llama, measured | {"recipe": str(file)})
    try:
        run("predicted", llama, LOSSLESS | {"target": "balanced"})
    except ValueError as refusal:
        results["llama predicted"] = str(refusal)
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
