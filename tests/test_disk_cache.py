"""Caches on disk that cannot be used cost a compilation and nothing else; a GPU's process has no numba."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton.runtime.cache import RemoteCacheManager, get_cache_manager

SCRIPT = """
import logging; logging.basicConfig()
import numpy as np
from {module} import double
print(double(np.ones(4, np.float32)).sum())
"""
MODULE = """
from fourier_vllm.kernels.cpu.disk_cache import jit

@jit(fastmath={"nsz"})
def half(x):
    return x * 1

@jit()
def double(x):
    return half(x) + x
"""
WARNING = "set NUMBA_CACHE_DIR"


@pytest.fixture
def run(tmp_path, root):
    """Runs the script in a process of its own; `no_folder` leaves numba no place for its cache."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "compiled.py").write_text(MODULE)

    def run(no_folder: bool = False, **environment: str) -> str:
        code = SCRIPT.format(module="compiled")
        if no_folder:  # as in an image built by root and run by somebody without a home
            code = "import numba.core.caching as c; c.CacheImpl._locator_classes = []" + code
        found = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": f"{root}:{package}"} | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert found.stdout.split() == ["8.0"]
        return found.stderr

    return run


def test_no_folder(run):
    assert run(no_folder=True).count(WARNING) == 1


@pytest.mark.parametrize("damage", ["truncated", "garbage", "folders", "no-data"])
def test_damaged_files(run, tmp_path, damage):
    folder = tmp_path / "cache"
    environment = {"NUMBA_CACHE_DIR": str(folder)}
    assert WARNING not in run(**environment)
    files = [x for x in folder.rglob("*") if x.suffix in (".nbi", ".nbc")]
    assert len(files) >= 4
    for file in files:
        if damage == "truncated":
            file.write_bytes(file.read_bytes()[:20])
        elif damage == "garbage":
            file.write_bytes(os.urandom(999))
        elif damage == "folders":
            file.unlink()
            file.mkdir()
        elif file.suffix == ".nbc":
            file.unlink()
    run(**environment)


def test_a_good_cache_is_used(run, tmp_path):
    """Negative control: what is written once is not written again."""
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    run(**environment)
    before = {x: x.stat().st_mtime_ns for x in (tmp_path / "cache").rglob("*.nbc")}
    run(**environment)
    assert before == {x: x.stat().st_mtime_ns for x in (tmp_path / "cache").rglob("*.nbc")}


def test_no_numba_on_a_gpu():
    """What an engine on a GPU imports."""
    code = (
        "import sys, fourier_vllm.engine.backend, fourier_vllm.engine.gpu.path\n"
        "assert 'numba' not in sys.modules, 'numba was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.fixture
def settle():
    """Settles anew, and leaves nothing settled."""
    from fourier_vllm.engine.gpu import triton_cache

    triton_cache.settle.cache_clear()
    yield triton_cache.settle
    triton_cache.settle.cache_clear()


@pytest.mark.parametrize("place", ["free", "a-file", "below-a-file"])
def test_triton_keeps_its_kernels_somewhere(tmp_path, monkeypatch, settle, place):
    from triton import knobs

    from fourier_vllm.engine.gpu import triton_cache

    said: list[str] = []
    monkeypatch.setattr(triton_cache.logger, "warning_once", lambda line, *_: said.append(line))
    (tmp_path / "file").touch()
    folder = {"free": "new/cache", "a-file": "file", "below-a-file": "file/cache"}[place]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / folder))
    settle()
    assert os.access(knobs.cache.dir, os.W_OK)
    assert (knobs.cache.dir == str(tmp_path / folder)) == (place == "free")
    assert len(said) == (place != "free")
    assert all("set TRITON_CACHE_DIR" in line for line in said)


KERNEL = {"k.json": b'{"name": "k"}', "k.ptx": b"// ptx", "k.cubin": None, "k.so": None}


@pytest.fixture
def triton_files(tmp_path, monkeypatch, settle):
    """A folder of Triton's cache with one kernel, and the manager that reads it."""
    from triton import knobs

    from fourier_vllm.engine.gpu import triton_cache

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(knobs.cache, "manager_class", None)
    settle()
    library = Path(sys.executable).read_bytes()  # an ELF file
    cache = get_cache_manager("c0ffee")
    assert type(cache) is triton_cache.SoundFiles
    paths = {name: cache.put(data or library, name) for name, data in KERNEL.items()}
    cache.put_group("k.json", paths)
    assert cache.get_group("k.json") == paths
    assert cache.get_file("k.so") == paths["k.so"]
    return cache, paths


@pytest.mark.parametrize("name", [*KERNEL, "__grp__k.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "another shape"])
def test_triton_passes_damaged_files_over(triton_files, name, damage):
    """A kernel whose metadata or code was cut off is compiled again; Triton's own cache loads it."""
    cache, paths = triton_files
    file = Path(paths["k.json"]).with_name(name)
    whole = file.read_bytes()
    shapes = {
        "truncated": whole[: len(whole) * 9 // 10],
        "empty": b"",
        "garbage": b"\x00\xff{" * 99,
    }
    file.write_bytes(shapes.get(damage, b'["a", "list"]'))
    if name.endswith(".ptx") and damage != "empty":  # never loaded where there is a cubin
        assert cache.get_group("k.json") == paths
        return
    assert cache.get_group("k.json") is None
    assert name != "k.so" or cache.get_file(name) is None


def test_a_cache_manager_that_the_user_chose_stays(monkeypatch, settle):
    from triton import knobs

    monkeypatch.setattr(knobs.cache, "manager_class", RemoteCacheManager)
    settle()
    assert knobs.cache.manager_class is RemoteCacheManager
