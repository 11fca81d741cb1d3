"""Where results lie, how they are written, and the model of benchmarks that name none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fourier_vllm.evaluation.machine import commit, machine, versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"


def load(file: Path) -> Any:
    return json.loads(file.read_text())


def save(file: Path, result: Any) -> None:
    """Write `result` as JSON over what the file held."""
    file.write_text(json.dumps(result, indent=1) + "\n")


def model_of(needles: dict[str, Any]) -> str:
    """The model of a result of `needles`, and how the engine quantised it."""
    quantised = needles.get("engine", {}).get("quantization")
    return f"{needles['model']} {quantised}" if quantised else str(needles["model"])


def measured_on(device: str, *packages: str) -> dict[str, Any]:
    """The machine, versions (of `packages` too) and commit of a measurement."""
    return machine(device) | versions(*packages) | {"commit": commit()}


def small_model() -> str:
    """Folder of SmolLM2-135M-Instruct, fetched where it is missing."""
    from fourier_vllm.demo.fetch import fetch

    return str(fetch("smollm2"))
