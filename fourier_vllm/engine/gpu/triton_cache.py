"""Triton's cache on disk: a folder or a file that cannot be used costs a compilation, nothing else."""

from __future__ import annotations

import json
import os
import struct
import tempfile
from functools import cache
from pathlib import Path

from triton import knobs
from triton.runtime.cache import FileCacheManager
from vllm.logger import init_logger

logger = init_logger("vllm.fourier_vllm")

# magic, class, e_phoff, e_shoff, e_phentsize, e_phnum, e_shentsize, e_shnum
ELF_HEADER = struct.Struct("<4sB27xQQ6xHHHH2x")
ELF_64 = (b"\x7fELF", 2)


@cache
def settle() -> None:
    """Give Triton a folder that can be written, and a cache that passes damaged files over, once a process.

    Triton by itself would end the first launch, or load a kernel that was cut off.
    """
    if knobs.cache.manager_class is None:
        knobs.cache.manager_class = SoundFiles
    folder = Path(knobs.cache.dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="fourier-vllm-triton-")
        logger.warning_once(
            "fourier: Triton cannot keep what it compiles in %s (%s), so that every start compiles again: "
            "set TRITON_CACHE_DIR to a folder of your own that can be written",
            folder,
            error.strerror,
        )


class SoundFiles(FileCacheManager):
    """Triton's cache on disk, in which a damaged file is one that is not there."""

    def get_file(self, filename: str) -> str | None:
        path = super().get_file(filename)
        return path if path is not None and sound(Path(path)) else None

    def get_group(self, filename: str) -> dict[str, str] | None:
        try:
            group = super().get_group(filename)
        except Exception:  # JSON of another shape
            return None
        return group if group and all(sound(Path(path)) for path in group.values()) else None


def sound(path: Path) -> bool:
    """Whether a file of the cache is whole, as far as its kind tells."""
    try:
        size = path.stat().st_size
        if path.suffix == ".json":
            return isinstance(json.loads(path.read_bytes()), dict)
        if path.suffix in (".cubin", ".so"):
            with path.open("rb") as file:
                fields = ELF_HEADER.unpack(file.read(ELF_HEADER.size))
            programs, sections, *sizes = fields[2:]
            ends = (programs + sizes[0] * sizes[1], sections + sizes[2] * sizes[3])
            return fields[:2] == ELF_64 and max(ends) <= size
        return size > 0
    except (OSError, ValueError, struct.error):
        return False
