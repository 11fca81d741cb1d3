"""The newest supported vLLM's Python sources over the compiled operators of the installed CPU build.

vLLM has no CPU build of that release. Its Python runs on the operators of the one before, which is a check of
its interfaces and its scheduling, not an installation to use.

FOURIER_VLLM_NEXT  the release's wheel, or a folder with its package `vllm`; else pip downloads the wheel
                   (336 MB) once, and the sources stay in this package's cache folder
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from fourier_vllm.files import cache_dir

NEXT = "0.33.0"
UNREACHABLE = r"from versions: none|connection broken|timed out|IncompleteRead|No module named pip"


def _download(folder: Path) -> Path:
    """The wheel, from pip's index."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary=:all:", "--platform=manylinux_2_28_x86_64", f"--dest={folder}"]
    run = subprocess.run([*command, f"vllm=={NEXT}"], capture_output=True, text=True, timeout=600)
    if run.returncode and re.search(UNREACHABLE, run.stderr):
        pytest.skip(f"pip cannot download vllm=={NEXT}; set FOURIER_VLLM_NEXT to its wheel")
    assert run.returncode == 0, run.stderr
    (wheel,) = folder.glob("vllm-*.whl")
    return wheel


def _unpack(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(folder, [n for n in names if re.fullmatch(r"vllm/.*\.py", n)])


def _sources(scratch: Path) -> Path:
    """Folder of the package `vllm`."""
    if given := os.environ.get("FOURIER_VLLM_NEXT"):
        if Path(given).is_dir():
            return Path(given).resolve() / "vllm"
        _unpack(Path(given), scratch)
        return scratch / "vllm"
    folder = cache_dir() / f"vllm-{NEXT}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as temporary:
            _unpack(_download(Path(temporary)), Path(temporary) / "new")
            (Path(temporary) / "new").rename(folder)
    return folder / "vllm"


def overlay(scratch: Path) -> Path:
    """A folder below `scratch` that shadows the installed vLLM where it comes first on PYTHONPATH."""
    import vllm

    if "cpu" not in version("vllm"):
        pytest.skip("needs vLLM's CPU build")
    folder = scratch / "overlay"
    package = folder / "vllm"
    package.mkdir(parents=True)
    for source in [*_sources(scratch).iterdir(), *Path(vllm.__file__).parent.glob("*.so")]:
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)
    info = folder / f"vllm-{NEXT}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {NEXT}+cpu\n")
    return folder
