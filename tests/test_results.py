"""The tables in docs/ are those that the committed results give."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks import serve
from benchmarks.report.serve import pivot


def pages(root: Path) -> dict[str, str]:
    files = [root / "README.md", *root.glob("docs/**/*.md")]
    return {file.relative_to(root).as_posix(): file.read_text() for file in files}


def test_pages_are_up_to_date(root: Path, tmp_path: Path) -> None:
    shutil.copy(root / "README.md", tmp_path)
    shutil.copytree(root / "docs", tmp_path / "docs")
    command = [sys.executable, "-m", "benchmarks.report", "--root", tmp_path]
    subprocess.run(command, cwd=root, check=True, timeout=120)
    assert pages(tmp_path) == pages(root)


def test_benchmarks_that_pages_name_are_there(root: Path) -> None:
    named = {
        (page, name)
        for page, text in (
            pages(root) | {"index": (root / "benchmarks/README.md").read_text()}
        ).items()
        for name in re.findall(r"-m benchmarks\.(\w+)|benchmarks/(\w+)\.py", text)
    }
    modules = {file.stem for file in root.glob("benchmarks/*.py")} | {"report"}
    assert {(page, a or b) for page, (a, b) in named if (a or b) not in modules} == set()


def test_the_index_lists_every_benchmark_and_result(root: Path) -> None:
    index = (root / "benchmarks/README.md").read_text()
    helpers = {"__init__", "record", "turboquant"}
    names = {f"`{file.stem}`" for file in root.glob("benchmarks/*.py") if file.stem not in helpers}
    names |= {f"`{file.name}`" for file in root.glob("benchmarks/results/*.json")}
    assert [name for name in sorted(names) if name not in index] == []


def test_a_cell_has_its_ratio_to_stock() -> None:
    rows = [
        {"engine": name, "gpus": gpus, "context": 1024, "batch": 8, "itl_ms": ms}
        for name, gpus, ms in (("fourier", 1, 3.0), ("stock", 1, 4.0), ("fourier", 2, 2.0))
    ]
    assert pivot(rows, ("context", "batch"), "itl_ms", 1).splitlines() == [
        "| context | batch | stock | fourier | fourier, 2 GPUs |",
        "| ---: | ---: | ---: | ---: | ---: |",
        "| 1,024 | 8 | 4.0 | 3.0 (0.75x) | 2.0 (0.50x) |",
    ]


def test_the_largest_batch_is_of_the_longest_requests() -> None:
    args = argparse.Namespace(batches=["1", "8", "fit"], max_prefill=1 << 22)
    found = list(serve.cases(args, 32768, 400_000))
    assert found[-1] == (32768, 12, True)
    assert [(c, b) for c, b, is_fit in found if not is_fit] == [
        (c, b) for c in (1024, 8192, 32768) for b in (1, 8)
    ]
