"""One sentence for what pydantic finds wrong with a recipe."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ValidationError

from fourier_vllm._text import nearest, show

WAY_OUT = "correct it or make the recipe again with `fourier-vllm calibrate`."
# How pydantic puts it, and how a reader of JSON does.
WORDS = (
    ("Input should", "must"),
    ("String should", "must"),
    ("should", "must"),
    ("valid tuple", "list"),
    ("valid dictionary or instance of LayerRecipe", "JSON object"),
    ("valid dictionary or instance of ModelFingerprint", "JSON object"),
    ("valid dictionary or instance of Provenance", "JSON object"),
    (", unable to parse raw data as a unicode string", ""),
)


def sentence(error: ValidationError, models: Mapping[str, type[BaseModel]]) -> str:
    """The first complaint: field, expected, found, way out.

    Parameters
    ----------
    models : mapping
        Models by the field that holds them, and by "" the one that was parsed.
    """
    first = error.errors(include_url=False)[0]
    place = ""
    for part in first["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    place = show(place, 80).strip("'\"")
    message = first["msg"]
    for pydantic, ours in WORDS:
        message = message.replace(pydantic, ours)
    if first["type"] == "extra_forbidden":
        owner = models[str(first["loc"][0]) if len(first["loc"]) > 1 else ""]
        way_out = nearest(first["loc"][-1], owner.model_fields)
        return f"unknown field {place}: {way_out}."
    if first["type"] == "missing":
        return f"{place} is missing: {WAY_OUT}"
    if first["type"] == "recipe":
        return f"{place} {message}: {WAY_OUT}".lstrip()
    return f"{place} {message}, found {show(first['input'])}: {WAY_OUT}"
