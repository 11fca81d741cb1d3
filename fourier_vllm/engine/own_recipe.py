"""The option `"recipe": "own-text"`: a recipe made once, on text that the model writes by itself.

A process of its own calibrates, before this engine has anything on the device and leaving nothing there.
What remains is a file in the cache folder, which the engine and its workers read like any recipe.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fourier_vllm._text import clip
from fourier_vllm.calibration.hf_model import model_name
from fourier_vllm.config import OWN_TEXT, FourierConfig
from fourier_vllm.engine.start_log import logger
from fourier_vllm.files import cache_dir, locked
from fourier_vllm.recipe import FORMAT, MEASURED_TARGET

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
PREFIX = "fourier-vllm calibrate: "


def settle(vllm_config: Any) -> None:
    """Put a file in the place of the option `own-text`; where it is missing, make it first.

    Raises
    ------
    ValueError
        This engine's model cannot be calibrated, in one sentence.
    """
    options = FourierConfig.from_engine(vllm_config)
    if options.recipe != OWN_TEXT:
        return
    if vllm_config.load_config.load_format == "dummy":
        raise _refusal("--load-format dummy has no weights")
    if vllm_config.model_config.revision not in (None, "main"):
        raise _refusal("calibration reads the main revision, and --revision asks for another")
    target = options.target or MEASURED_TARGET
    arguments = _arguments(vllm_config, options, target)
    model = vllm_config.model_config
    path = cache_dir() / "recipes" / _file_name(model, target, arguments)
    if not path.exists():
        _make(path, model.model, arguments)
    additional = vllm_config.additional_config
    vllm_config.additional_config = {
        **additional,
        "fourier": {**additional["fourier"], "recipe": str(path)},
    }


def _arguments(vllm_config: Any, options: FourierConfig, target: str) -> list[str]:
    """What `fourier-vllm calibrate` is told beside the model and the file."""
    geometry = options.geometry()
    values = {
        "--target": target,
        "--page-size": geometry.page_size,
        "--local-window": geometry.local_window,
        "--sink-tokens": geometry.sink_tokens,
        "--tensor-parallel-size": vllm_config.parallel_config.tensor_parallel_size,
    }
    return ["--own-text", "--no-check", *(str(x) for item in values.items() for x in item)]


def _file_name(model_config: Any, target: str, arguments: list[str]) -> str:
    name = model_name(model_config.model)
    key = json.dumps([FORMAT, name, arguments, _weights(model_config)])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return f"{name.split('/')[-1].lower()}-{target}-{digest}.json"


def _weights(model_config: Any) -> list[Any]:
    """What changes when the weights do, without reading them."""
    path = Path(model_config.model)
    if not path.exists():
        return [getattr(model_config.hf_config, "_commit_hash", None)]
    config = path / "config.json"
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    kept = [(file.name, file.stat()) for file in files if file.suffix in WEIGHTS]
    return [
        config.read_text(encoding="utf-8") if config.is_file() else None,
        *((name, stat.st_size, stat.st_mtime_ns) for name, stat in kept),
    ]


def _make(path: Path, model: str, arguments: list[str]) -> None:
    """Calibrate into `path`, or wait for the process that already does."""
    lock = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError:
        raise _refusal(f"no file can be made in {path.parent}, which FOURIER_CACHE sets") from None
    with locked(lock):
        if path.exists():  # another process has just made it
            return
        logger.info(
            "fourier: recipe own-text: %s writes text and is calibrated on it, once; this takes "
            "minutes on a GPU, on a CPU much longer (%s)",
            model_name(model),
            path,
        )
        start = time.monotonic()
        command = [sys.executable, "-m", "fourier_vllm.cli", "calibrate", model, *arguments]
        done = subprocess.run(
            [*command, "-o", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise _refusal(lines[-1] if lines else f"calibration ended with {done.returncode}")
        logger.info("fourier: recipe own-text made in %.0f s", time.monotonic() - start)


def _refusal(reason: str) -> ValueError:
    # The reason may be a sentence with a way out of its own, or the last line of a traceback.
    reason = ascii(reason.removeprefix(PREFIX).split(". ")[0].rstrip("."))[1:-1]
    return ValueError(
        f"recipe {OWN_TEXT!r} cannot be made ({clip(reason, 240)}): leave the option `recipe` out."
    )
