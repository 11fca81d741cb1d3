"""`fourier-vllm eval --engine`: the same contexts and probes through vLLM, one engine after another."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tqdm import tqdm

from fourier_vllm.calibration.hf_model import load_tokenizer
from fourier_vllm.evaluation import results
from fourier_vllm.evaluation.choose import Span
from fourier_vllm.evaluation.contexts import BEHIND_TOKENS
from fourier_vllm.evaluation.engine_session import EngineSession, reason, running
from fourier_vllm.evaluation.formats.base import RAW_BITS, Format
from fourier_vllm.evaluation.formats.fourier import Fourier
from fourier_vllm.evaluation.machine import versions
from fourier_vllm.evaluation.options import CHUNK, Options
from fourier_vllm.evaluation.plan import make_plan
from fourier_vllm.evaluation.tasks.base import Probe

DTYPE = "bfloat16"
PREFILL = "windowed"
POOL_SEQUENCES = 3  # of the longest, raw: a context, its question, and room for what vLLM reserves

Contexts = Sequence[tuple[list[int], Sequence[tuple[str, Probe]]]]


def evaluate_engine(options: Options) -> dict[str, Any]:
    """Measure stock attention and each recipe.

    Returns
    -------
    dict
        As written to `results.json`, which is there after the first engine and grows with each.

    Raises
    ------
    ValueError
        Model, recipes, text or context do not fit each other, or vLLM cannot run them.
    """
    from fourier_vllm.engine.fingerprint import fingerprint_of

    tokenizer = load_tokenizer(options.model)
    longest = options.context + BEHIND_TOKENS
    engine: dict[str, Any] = {
        "max_num_batched_tokens": min(options.chunk or CHUNK, longest),
        "max_model_len": longest,
        "enforce_eager": True,
        "enable_prefix_caching": True,
    }
    model = model_config(options.model)
    engine["kv_cache_memory_bytes"] = POOL_SEQUENCES * longest * raw_bytes(model)
    plan = make_plan(
        replace(options, compare=("none",)),
        tokenizer,
        fingerprint_of(model),
        model.max_model_len,
        {"dtype": DTYPE, "engine": {"prefill": PREFILL, **engine}},
        "cuda" if torch.cuda.is_available() else "cpu",
    )
    record = plan.record | {"versions": versions("vllm"), "documents_done": options.documents}
    found = [context for number in range(options.documents) for context in plan.contexts(number)]
    rows = results.Rows({form.name: form.family for form in plan.forms})
    began = time.perf_counter()
    with (
        TemporaryDirectory() as folder,
        tqdm(total=len(plan.forms) * len(found), desc="eval", unit="cache", disable=None) as bar,
    ):
        fixed = dict(model=options.model, dtype=DTYPE, max_num_seqs=1)
        kinds = [fixed | engine | backend(form, Path(folder)) for form in plan.forms]
        for settings in kinds:
            check_engine(settings)
        for number, (form, settings) in enumerate(zip(plan.forms, kinds, strict=True)):
            with running(settings) as llm:
                measure(llm, form, found, plan.span, rows, bar.update)
            record |= {
                "seconds": round(time.perf_counter() - began, 1),
                "rows": rows.dump()[: number + 1],
            }
            results.save(options.out / "results.json", record)
    return record


def measure(
    llm: Any,
    form: Format,
    found: Contexts,
    span: Span,
    rows: results.Rows,
    update: Callable[[], Any],
) -> None:
    """Put the probes of all contexts to one engine; exact is the first that is asked."""
    for ids, probes in found:
        rows.bits[form.name].append(bits_of(form, span))
        session = EngineSession(llm, ids, span.end)
        for task, probe in probes:
            (metrics,) = probe.measure(session)
            rows.add(form.name, task, metrics)
        update()


def bits_of(form: Format, span: Span) -> float:
    """Stored bits a value of the compressed middle, mean of the layers."""
    if not isinstance(form, Fourier):
        return RAW_BITS
    layers = range(len(form.layouts))
    return sum(form.bits(span.start, span.end, layer) for layer in layers) / len(layers)


def backend(form: Format, folder: Path) -> dict[str, Any]:
    """vLLM's options of a format; its recipe is written to the folder."""
    if not isinstance(form, Fourier):
        return {}
    file = folder / f"{form.name}.json"
    form.recipe.save(file)
    options = {"recipe": str(file), "prefill": PREFILL}
    return {"attention_backend": "fourier", "additional_config": {"fourier": options}}


def model_config(model: str) -> Any:
    """The model as vLLM sees it; raises ValueError where it cannot run it."""
    from vllm.engine.arg_utils import EngineArgs

    try:
        return EngineArgs(model=model, dtype=DTYPE).create_model_config()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"vLLM cannot run this model ({reason(error)}): choose another one, or leave out"
            " --engine."
        ) from None


def check_engine(settings: dict[str, Any]) -> None:
    """Raise ValueError for an engine that cannot be, before the first one has run for hours."""
    from vllm.engine.arg_utils import EngineArgs

    try:
        EngineArgs(**settings).create_engine_config()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{reason(error)}.") from None


def raw_bytes(model: Any) -> int:
    """Bytes of a token's K and V in all layers."""
    heads, layers = model.get_total_num_kv_heads(), model.hf_text_config.num_hidden_layers
    return 2 * layers * heads * model.get_head_size() * model.dtype.itemsize
