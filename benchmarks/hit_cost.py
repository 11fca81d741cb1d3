"""What a prefix-cache hit costs in quality: KL of a turn behind pages alone, and behind a raw window.

    python -m benchmarks.hit_cost [--documents 8] [--context 2944] [--turn 256]

A hit takes pages and the first raw block, so the turn that follows reads the last tokens before it from
pages; a request that goes on without a break reads its local window raw. KL to exact attention, in nats a
token, with SmolLM2's shipped recipes in the loop of the Hugging Face model, on documents that no calibration
sees.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import RESULTS, measured_on, save, small_model
from fourier_vllm.calibration.hf_model import fingerprint_of, full_attention_layers, load
from fourier_vllm.evaluation.held_out import CHARS_A_TOKEN, through_pages
from fourier_vllm.evaluation.text import documents
from fourier_vllm.recipe import find_bundled
from fourier_vllm.recipe.describe import layouts

SPANS = ((0, 16), (16, 64), (64, 256))  # tokens of the turn


@torch.inference_mode()
def kl_of_turn(model: Any, ids: torch.Tensor, split: int, recipes: list[Any]) -> torch.Tensor:
    """KL to exact attention of every token after the first `split`: `[recipes, tokens]`."""
    from transformers import DynamicCache

    exact = DynamicCache(config=model.config)
    model.base_model(input_ids=ids[None, :split], past_key_values=exact, use_cache=True)

    def predict(cache: Any) -> torch.Tensor:
        out = model(input_ids=ids[None, split:], past_key_values=cache, use_cache=True)
        return out.logits[0].float().log_softmax(-1)

    logp, rows = predict(copy.deepcopy(exact)), []
    for recipe in recipes:
        cache = copy.deepcopy(exact)
        for i, layout in zip(full_attention_layers(model), layouts(recipe), strict=True):
            layer = cache.layers[i]
            k, v = through_pages(layer.keys[0], layer.values[0], recipe, layout)
            layer.keys, layer.values = k[None], v[None]
        rows.append((logp.exp() * (logp - predict(cache))).sum(1))
    return torch.stack(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder with SmolLM2-135M-Instruct; default: fetched")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--context", type=int, default=2944, help="tokens, whole pages")
    parser.add_argument("--turn", type=int, default=256)
    parser.add_argument("--targets", nargs="+", default=["balanced", "quality"])
    parser.add_argument("--out", type=Path, default=RESULTS / "hit_cost.json")
    args = parser.parse_args()
    model, tokenizer = load(args.model or small_model())
    bundled = {t: find_bundled(fingerprint_of(model), t) for t in args.targets}
    recipes = {target: recipe for target, recipe in bundled.items() if recipe is not None}
    if len(recipes) < len(bundled):
        parser.error(f"no recipes ship for this model and {', '.join(args.targets)}")
    # A recipe without a window reads everything from pages, as a hit does.
    kinds = [
        (target, name, recipe.model_copy(update={"local_window": window}))
        for target, recipe in recipes.items()
        for name, window in (("window raw", recipe.local_window), ("hit", 0))
    ]
    found = []
    for text in documents(args.documents, CHARS_A_TOKEN * (args.context + args.turn)):
        ids = torch.tensor(tokenizer(text, verbose=False).input_ids[: args.context + args.turn])
        ids = ids.to(model.device)
        found.append(kl_of_turn(model, ids, args.context, [recipe for *_, recipe in kinds]))
    mean = torch.stack(found).double().mean(0)
    rows = []
    for (target, name, _), kl in zip(kinds, mean, strict=True):
        spans = {f"tokens {a} to {b}": round(float(kl[a:b].mean()), 5) for a, b in SPANS}
        rows.append({"target": target, "context": name, "kl": round(float(kl.mean()), 5), **spans})
        print(rows[-1], flush=True)
    result = {
        "machine": measured_on(model.device.type),
        "documents": args.documents,
        "context": args.context,
        "rows": rows,
    }
    save(args.out, result)


if __name__ == "__main__":
    main()
