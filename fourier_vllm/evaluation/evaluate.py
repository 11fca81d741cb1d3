"""`fourier-vllm eval`: what KV formats cost in quality, each on the same exactly prefilled contexts."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fourier_vllm._text import show
from fourier_vllm.calibration.hf_model import (
    fingerprint_of,
    full_attention_layers,
    load,
    max_tokens,
)
from fourier_vllm.evaluation import results
from fourier_vllm.evaluation.choose import Span
from fourier_vllm.evaluation.contexts import prefills
from fourier_vllm.evaluation.formats.base import Format
from fourier_vllm.evaluation.options import Options, check
from fourier_vllm.evaluation.plan import make_plan
from fourier_vllm.evaluation.session import CodecSession, hold, prefill, stack
from fourier_vllm.evaluation.tasks.base import Probe

STACK_BYTES = 2 << 30  # of the caches that are run as one batch


# What must not have changed for an interrupted run to go on.
SAME = ("model", "fingerprint", "settings", "recipes", "versions", "commit")


def run(options: Options) -> int:
    """Evaluate, write the report and print its table; returns the exit code."""
    from fourier_vllm.evaluation.report import write

    check(options)
    if options.engine:
        from fourier_vllm.evaluation.engine_run import evaluate_engine

        print(write(evaluate_engine(options), options.out))
        return 0
    try:
        data = evaluate(options)
    except torch.OutOfMemoryError:
        raise ValueError(
            "the device is out of memory: choose a smaller --context, or another --device."
        ) from None
    print(write(data, options.out))
    return 0


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
    plan = make_plan(
        options,
        tokenizer,
        fingerprint_of(model),
        max_tokens(model),
        {"dtype": str(model.dtype).removeprefix("torch.")},
        str(model.device),
    )
    forms, record = plan.forms, plan.record
    file = options.out / "results.json"
    rows = results.Rows({form.name: form.family for form in forms})
    done, seconds = resume(file, record, rows)
    layers = full_attention_layers(model)
    for number in range(done, options.documents):
        for _ in plan.contexts(number):
            pass  # a text that will not do is refused before hours of work
    total = (options.documents - done) * len(forms) * prefills(options)
    with tqdm(total=total, desc="eval", unit="cache", disable=None) as bar:
        for number in range(done, options.documents):
            began = time.perf_counter()
            for ids, probes in plan.contexts(number):
                measure(model, ids, probes, forms, layers, plan.span, rows, bar.update)
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
        session = CodecSession(model, stack([cache for _, (cache, _) in batch]), len(ids))
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
