"""What a run measures and on what: settled, and refused, before anything is measured."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fourier_vllm.calibration.hf_model import model_name
from fourier_vllm.evaluation import results
from fourier_vllm.evaluation.choose import Span, choose_formats, span_of
from fourier_vllm.evaluation.contexts import BEHIND_TOKENS, contexts, read_documents
from fourier_vllm.evaluation.formats.base import Format
from fourier_vllm.evaluation.formats.fourier import Fourier
from fourier_vllm.evaluation.machine import commit, machine, versions
from fourier_vllm.evaluation.options import Options
from fourier_vllm.evaluation.tasks.base import Probe
from fourier_vllm.recipe import ModelFingerprint, Recipe


@dataclass(frozen=True)
class Plan:
    """A run that can be made.

    Attributes
    ----------
    forms : list of Format
        Exact first.
    record : dict
        `results.json` so far, without results.
    """

    options: Options
    tokenizer: Any
    forms: list[Format]
    span: Span
    texts: list[str]
    record: dict[str, Any]

    def contexts(self, number: int) -> Iterator[tuple[list[int], list[tuple[str, Probe]]]]:
        """Token ids of each context of a document, and its probes with their tasks' names."""
        start = self.tokenizer("").input_ids[:1]
        first = start if start and start[0] == self.tokenizer.bos_token_id else []
        return contexts(self.options, self.texts[number], number, self.tokenizer, first, self.span)


def make_plan(
    options: Options,
    tokenizer: Any,
    model: ModelFingerprint,
    longest: int,
    settings: Mapping[str, Any],
    device: str,
) -> Plan:
    """Choose formats, read the texts and describe the run.

    Parameters
    ----------
    longest : int
        Tokens the model was made for.
    settings : mapping
        Further ones, for the record.
    device : str
        As torch names it.

    Raises
    ------
    ValueError
        Model, recipes, text or context do not fit each other.
    """
    forms = choose_formats(options, model)
    span = span_of(forms, options.context)
    if options.context > longest - BEHIND_TOKENS:
        raise ValueError(
            f"--context must be at most {longest - BEHIND_TOKENS} for this model of {longest}"
            f" tokens, found {options.context}: choose a smaller one."
        )
    texts = read_documents(options)
    record: dict[str, Any] = {
        "format": results.FORMAT,
        "model": model_name(options.model),
        "fingerprint": model.model_dump(),
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
            **settings,
            **span._asdict(),
        },
        "recipes": {form.name: origin(form.recipe) for form in forms if isinstance(form, Fourier)},
        "versions": versions(),
        "commit": commit(),
        "machine": machine(device),
    }
    return Plan(options, tokenizer, forms, span, texts, record)


def fingerprint_of_texts(texts: Sequence[str]) -> str:
    """Manuals differ between versions of Python."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def origin(recipe: Recipe) -> dict[str, Any]:
    """Which recipe it was, and where it comes from."""
    digest = hashlib.sha256(recipe.dumps().encode()).hexdigest()
    return {"sha256": digest, **recipe.provenance.model_dump(exclude_none=True)}
