"""The planned caches are checked and logged whatever the process has imported before."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import fourier_vllm.engine.cache.specs

assert "vllm.v1.engine.core" not in sys.modules, "the order that this test is about"
from pathlib import Path

from tests.support.scheduling import engine_config

engine_config(Path({folder!r}), attention_backend="fourier", max_model_len=512)
print(hasattr(sys.modules["vllm.v1.engine.core"].update_kv_cache_capacity, "__wrapped__"))
"""


def test_specs_that_were_imported_first(tmp_path, root):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(folder=str(tmp_path))],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "True"
