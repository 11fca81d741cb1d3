"""Recipes that an engine measures, beside `calibrate` on text of the same domain and predicted ones.

    python -m benchmarks.self_calibration MODEL --texts FOLDER [--contexts 4096 7168 16384] [--hows HOW ...]

The folder holds DOMAIN.txt files that no recipe of this package has seen. `calibrate` reads the first 40 % of
a file, and documents behind that are scored: KL to exact attention and rise of the NLL, pages in the loop of
the Hugging Face model (`fourier_vllm/evaluation/held_out.py`). All recipes have equal bytes. A shipped recipe
of the model is not looked at. On a GPU the engine, which goes first, leaves the memory free. `own-text` takes
minutes, because the model writes it one token after another.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import RESULTS, load, save
from fourier_vllm.calibration.calibrate import Options, calibrate
from fourier_vllm.evaluation.machine import commit, machine, versions
from fourier_vllm.recipe import TARGETS, Recipe
from fourier_vllm.recipe.describe import ratio_of

SCORED = 256  # tokens behind a context
CALIBRATED = 0.4  # of a file, its beginning
CHARS_A_TOKEN = 8
HOWS = ("measured", "predicted", "calibrate", "own-text")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="Hugging Face folder")
    parser.add_argument("--texts", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--domains", nargs="+", help="default: all files")
    parser.add_argument("--contexts", nargs="+", type=int, default=[4096, 7168, 16384])
    parser.add_argument("--documents", type=int, default=2, help="of a domain and context")
    parser.add_argument("--tokens", type=int, default=16384, help="that `calibrate` reads")
    parser.add_argument("--target", choices=TARGETS, default="balanced")
    parser.add_argument("--hows", nargs="+", choices=HOWS, default=list(HOWS[:3]))
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for the recipes")
    parser.add_argument("--append", action="store_true", help="to the rows that are there")
    parser.add_argument("--out", type=Path, default=RESULTS / "self_calibration.json")
    return parser.parse_args()


def from_engine(model: str, target: str, folder: str) -> None:
    """In a process of its own: write measured.json and predicted.json of a model into a folder."""
    os.environ |= {"FOURIER_CACHE": folder, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM

    from fourier_vllm.calibration.predict import layer_recipe
    from fourier_vllm.engine.model_weights import read_projections

    options = {"fourier": {"recipe": "measured", "target": target}}
    llm = LLM(
        model,
        attention_backend="fourier",
        additional_config=options,
        max_model_len=2048,
        gpu_memory_utilization=0.2,
        kv_cache_memory_bytes=1 << 28,
        enforce_eager=True,
        kernel_config={"enable_flashinfer_autotune": False},
    )
    (file,) = Path(folder).glob("recipes/*.json")
    measured = Recipe.load(file)
    measured.save(Path(folder) / "measured.json")
    config = llm.llm_engine.vllm_config
    layers = config.compilation_config.static_forward_context.values()
    impls = [x.impl for x in layers if getattr(getattr(x, "impl", None), "bound", None)]
    predicted = []
    for ordinal, impl in enumerate(impls):
        heads = impl.num_heads, impl.num_kv_heads, impl.head_size
        of_model = config.model_config.dtype, config.model_config.hf_text_config
        projections = read_projections(impl.ancestry, *heads, *of_model)
        page = measured.page_size
        predicted.append(layer_recipe(measured.model, target, ordinal, page, projections))
    changes = {"layers": predicted, "provenance": {"source": "weights"}}
    Recipe.from_dict(measured.model_dump() | changes).save(Path(folder) / "predicted.json")


def engine_recipes(model: str, target: str) -> dict[str, tuple[Recipe, float]]:
    """Recipes of an engine by how they came, with seconds; those of the measured one include the start."""
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=from_engine, args=(model, target, folder))
        process.start()
        process.join()
        seconds = time.perf_counter() - begin
        return {
            how: (Recipe.load(Path(folder) / f"{how}.json"), seconds if how == "measured" else 0)
            for how in ("measured", "predicted")
        }


def calibrated(args: argparse.Namespace, text: str | None) -> tuple[Recipe, float]:
    """What `fourier-vllm calibrate` gives for a text, or for the model's own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.txt"
        if text is not None:
            file.write_text(text)
        options = Options(
            model=args.model,
            text=None if text is None else file,
            own_text=text is None,
            target=args.target,
            tokens=args.tokens,
            check=False,
        )
        begin = time.perf_counter()
        return calibrate(options, Path(folder) / "progress.npz"), time.perf_counter() - begin


def documents(tokenizer: Any, text: str, length: int, count: int) -> Iterator[Tensor]:
    """Token ids, spread evenly over a text."""
    for i in range(count):
        start = i * len(text) // count
        part = text[start : start + CHARS_A_TOKEN * length]
        ids = tokenizer(part, verbose=False).input_ids[:length]
        assert len(ids) == length, "the text is too short"
        yield torch.tensor(ids)


def main() -> None:
    from fourier_vllm.calibration.hf_model import load as load_model
    from fourier_vllm.calibration.hf_model import model_name
    from fourier_vllm.evaluation.held_out import score

    args = parse()
    made = {}
    if {"measured", "predicted"} & set(args.hows):
        of_engine = engine_recipes(args.model, args.target)
        made = {how: found for how, found in of_engine.items() if how in args.hows}
    if "own-text" in args.hows:
        made["own-text"] = calibrated(args, None)
    model, tokenizer = load_model(args.model)
    rows = load(args.out) if args.append and args.out.exists() else []
    files = sorted(args.texts.glob("*.txt"))
    where = {"gpu": machine(model.device.type)["device"], "commit": commit(), **versions("vllm")}
    for file in files:
        if args.domains and file.stem not in args.domains:
            continue
        text = file.read_text("utf-8")
        cut = int(CALIBRATED * len(text))
        recipes = dict(made)
        if "calibrate" in args.hows:
            recipes["calibrate"] = calibrated(args, text[:cut])
        if args.keep is not None:
            args.keep.mkdir(parents=True, exist_ok=True)
            for how, (recipe, _) in recipes.items():
                recipe.save(args.keep / f"{model_name(args.model)}-{how}-{file.stem}.json")
        for context in args.contexts:
            found = []
            for ids in documents(tokenizer, text[cut:], context + SCORED, args.documents):
                only = [recipe for recipe, _ in recipes.values()]
                exact, losses = score(model, ids[:context], ids[context:], only)
                found.append([(loss.kl, loss.nll - exact) for loss in losses])
            means = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
            for (how, (recipe, seconds)), (kl, nll) in zip(recipes.items(), means, strict=True):
                row = {"model": model_name(args.model), "how": how, "domain": file.stem}
                row |= {"context": context, "documents": args.documents, "target": args.target}
                row |= {
                    "ratio": round(ratio_of(recipe), 3),
                    "kl": round(kl, 5),
                    "nll": round(nll, 5),
                }
                rows.append(row | {"seconds": round(seconds, 1)} | where)
                print(rows[-1], flush=True)
            save(args.out, rows)


if __name__ == "__main__":
    main()
