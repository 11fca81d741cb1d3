"""`fourier-vllm eval`: what KV formats cost in quality, each on the same exactly prefilled contexts."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fourier_vllm._text import nearest, show
from fourier_vllm.calibration.model import (
    fingerprint_of,
    full_attention_layers,
    load,
    max_tokens,
    model_name,
)
from fourier_vllm.evaluation import results
from fourier_vllm.evaluation.choose import Span, choose_formats, span_of
from fourier_vllm.evaluation.contexts import BEHIND_TOKENS, contexts, prefills, read_documents
from fourier_vllm.evaluation.formats.base import Format
from fourier_vllm.evaluation.formats.fourier import Fourier
from fourier_vllm.evaluation.machine import commit, machine, versions
from fourier_vllm.evaluation.session import Session, hold, prefill, stack
from fourier_vllm.evaluation.tasks import TASKS
from fourier_vllm.evaluation.tasks.base import Probe
from fourier_vllm.evaluation.tasks.haystack import MAX_NEEDLES
from fourier_vllm.recipe import Recipe

STACK_BYTES = 2 << 30  # of the caches that are run as one batch


# What must not have changed for an interrupted run to go on.
SAME = ("model", "fingerprint", "settings", "recipes", "versions", "commit")


@dataclass(frozen=True)
class Options:
    """What `fourier-vllm eval` was asked for."""

    model: str
    recipes: Sequence[Path] = ()
    targets: Sequence[str] = ()
    tasks: Sequence[str] = tuple(TASKS)
    compare: Sequence[str] = ("all",)
    context: int = 7168
    documents: int = 8
    questions: int = 8
    repeats: int = 1
    text: Sequence[Path] = ()
    out: Path = field(default_factory=lambda: Path("eval"))
    device: str | None = None
    seed: int = 0


def run(options: Options) -> int:
    """Evaluate, write the report and print its table; returns the exit code."""
    from fourier_vllm.evaluation.report import write

    check(options)
    try:
        data = evaluate(options)
    except torch.OutOfMemoryError:
        raise ValueError(
            "the device is out of memory: choose a smaller --context, or another --device."
        ) from None
    print(write(data, options.out))
    return 0


def check(options: Options) -> None:
    """Refuse before a model is loaded.

    Raises
    ------
    ValueError
        An option is out of range or names something unknown, or the folder cannot be written.
    """
    for name in options.tasks:
        if name not in TASKS:
            raise ValueError(f"--tasks has {show(name)}, which is unknown: {nearest(name, TASKS)}.")
    for option, value, highest in (
        ("--documents", options.documents, 1 << 20),
        ("--questions", options.questions, MAX_NEEDLES),
        ("--repeats", options.repeats, 1 << 10),
        ("--context", options.context, 1 << 24),
    ):
        if not 1 <= value <= highest:
            raise ValueError(f"{option} must be 1 to {highest}, found {value}: choose another one.")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--out {show(options.out, 120)} cannot be made ({error.strerror}): give a folder that"
            " can be written."
        ) from None


def evaluate(options: Options) -> dict[str, Any]:
    """Measure every format; goes on where an interrupted run with the same options stopped.

    Returns
    -------
    dict
        As written to `results.json`.

    Raises
    ------
    ValueError
        Model, recipes, text or context do not fit each other.
    """
    model, tokenizer = load(options.model)
    if options.device is not None:
        model = on_device(model, options.device)
    forms = choose_formats(options, fingerprint_of(model))
    span = span_of(forms, options.context)
    longest = max_tokens(model) - BEHIND_TOKENS
    if options.context > longest:
        raise ValueError(
            f"--context must be at most {longest} for this model of {max_tokens(model)} tokens,"
            f" found {options.context}: choose a smaller one."
        )
    texts = read_documents(options)
    file = options.out / "results.json"
    rows = results.Rows({form.name: form.family for form in forms})
    record: dict[str, Any] = {
        "format": results.FORMAT,
        "model": model_name(options.model),
        "fingerprint": fingerprint_of(model).model_dump(),
        "settings": {
            "tasks": list(options.tasks),
            "formats": [form.name for form in forms],
            "context": options.context,
            "documents": options.documents,
            "questions": options.questions,
            "repeats": options.repeats,
            "text": [file.name for file in options.text] or "Python's manuals",
            "text_sha256": fingerprint_of_texts(texts),
            "seed": options.seed,
            "dtype": str(model.dtype).removeprefix("torch."),
            **span._asdict(),
        },
        "recipes": {form.name: origin(form.recipe) for form in forms if isinstance(form, Fourier)},
        "versions": versions(),
        "commit": commit(),
        "machine": machine(str(model.device)),
    }
    done, seconds = resume(file, record, rows)
    layers = full_attention_layers(model)
    start = tokenizer("").input_ids[:1]
    first = start if start and start[0] == tokenizer.bos_token_id else []
    for number in range(done, options.documents):
        for _ in contexts(options, texts[number], number, tokenizer, first, span):
            pass  # a text that will not do is refused before hours of work
    total = (options.documents - done) * len(forms) * prefills(options)
    with tqdm(total=total, desc="eval", unit="cache", disable=None) as bar:
        for number in range(done, options.documents):
            began = time.perf_counter()
            for ids, probes in contexts(options, texts[number], number, tokenizer, first, span):
                measure(model, ids, probes, forms, layers, span, rows, bar.update)
            seconds += time.perf_counter() - began
            record |= {
                "documents_done": number + 1,
                "seconds": round(seconds, 1),
                "rows": rows.dump(),
            }
            results.save(file, record)
    return record


def measure(
    model: Any,
    ids: list[int],
    probes: Sequence[tuple[str, Probe]],
    forms: Sequence[Format],
    layers: Sequence[int],
    span: Span,
    rows: results.Rows,
    update: Callable[[int], Any],
) -> None:
    """Put the probes to one context in every format, the first of which is exact."""
    exact = prefill(model, ids)
    held = (hold(exact, form, layers, span.start, span.end) for form in forms)
    for batch in batches(zip(forms, held, strict=True), layers):
        for form, (_, bits) in batch:
            rows.bits[form.name].append(bits)
        session = Session(model, stack([cache for _, (cache, _) in batch]), len(ids))
        for task, probe in probes:
            for (form, _), metrics in zip(batch, probe.measure(session), strict=True):
                rows.add(form.name, task, metrics)
        update(len(batch))


def batches(held: Iterator[Any], layers: Sequence[int]) -> Iterator[list[Any]]:
    """Runs of caches of equal length that are small enough together."""

    def length(item: Any) -> int:
        return item[1][0].layers[layers[0]].keys.shape[2]

    for _, run in itertools.groupby(held, length):
        batch: list[Any] = []
        for item in run:
            batch.append(item)
            cache = item[1][0]
            size = sum(2 * layer.keys.numel() * layer.keys.itemsize for layer in cache.layers)
            if (len(batch) + 1) * size > STACK_BYTES:
                yield batch
                batch = []
        if batch:
            yield batch


def on_device(model: Any, device: str) -> Any:
    """The model where `--device` wants it.

    Raises
    ------
    ValueError
        There is no such device.
    """
    try:
        # CPUs multiply 16-bit numbers slowly.
        return model.float().to(device) if device == "cpu" else model.to(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"--device {show(device)} cannot be used ({reason}): choose cpu, cuda or cuda:N."
        ) from None


def fingerprint_of_texts(texts: Sequence[str]) -> str:
    """Manuals differ between versions of Python."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def origin(recipe: Recipe) -> dict[str, Any]:
    """Which recipe it was, and where it comes from."""
    digest = hashlib.sha256(recipe.dumps().encode()).hexdigest()
    return {"sha256": digest, **recipe.provenance.model_dump(exclude_none=True)}


def resume(file: Path, record: dict[str, Any], rows: results.Rows) -> tuple[int, float]:
    """Documents and seconds of an unfinished run of the same kind, whose samples go into `rows`."""
    if not file.exists():
        return 0, 0.0
    before = results.load(file)
    same = all(before.get(name) == record[name] for name in SAME)
    if not same or before["documents_done"] >= record["settings"]["documents"]:
        return 0, 0.0
    rows.restore(before["rows"])
    return before["documents_done"], before["seconds"]
