"""`vartrack`: a value handed on from variable to variable; all of them must be named."""

from __future__ import annotations

import string

from fourier_vllm.evaluation.tasks.base import Probe, Source
from fourier_vllm.evaluation.tasks.haystack import Question, hide, names_all

HOPS = 4


def vartrack(source: Source) -> tuple[list[int], list[Probe]]:
    """One chain of four hops, five variables; right where every one is named."""
    rng = source.rng()
    names: list[str] = []
    while len(names) <= HOPS:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    value = str(rng.randint(10_000, 99_999))
    values = [value, *(f"VAR {name}" for name in names[:-1])]
    context = hide(source, [f"VAR {n} = {v}." for n, v in zip(names, values, strict=True)])
    question = Question.make(
        source,
        f"\n\nQuestion: find all variables that are assigned the value {value} in the text above."
        "\nAnswer: According to the chain of variable assignments in the text above,"
        f" {len(names)} variables are assigned the value {value}, they are: ",
        ", ".join(names),
        names_all(names),
    )
    return context, [question]
