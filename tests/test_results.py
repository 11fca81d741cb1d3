"""The tables in docs/ are those that the committed results give."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def benchmark(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a script as it would be when run."""
    monkeypatch.syspath_prepend(root / "benchmarks")
    return importlib.import_module


@pytest.mark.parametrize(
    ("script", "pages", "options"),
    [
        ("tables", {"--page": "docs/evidence/performance.md"}, ["--write"]),
        ("serve_report", {"--page": "docs/evidence/results.md", "--readme": "README.md"}, []),
        (
            "trust_report",
            {"--page": "docs/evidence/trust.md", "--recipes": "docs/use/recipes.md"},
            [],
        ),
    ],
)
def test_pages_are_up_to_date(root, tmp_path, script, pages, options):
    copies = {option: tmp_path / Path(page).name for option, page in pages.items()}
    before = {option: (root / page).read_text() for option, page in pages.items()}
    for option, copy in copies.items():
        copy.write_text(before[option])
        options = [*options, option, copy]
    subprocess.run(
        [sys.executable, root / f"benchmarks/{script}.py", *options], check=True, timeout=120
    )
    assert {option: copy.read_text() for option, copy in copies.items()} == before


def test_a_cell_has_its_ratio_to_stock(benchmark):
    report = benchmark("serve_report")
    rows = [
        {"engine": name, "gpus": gpus, "context": 1024, "batch": 8, "itl_ms": ms}
        for name, gpus, ms in (("fourier", 1, 3.0), ("stock", 1, 4.0), ("fourier", 2, 2.0))
    ]
    assert report.pivot(rows, ("context", "batch"), "itl_ms", 1).splitlines() == [
        "| context | batch | stock | fourier | fourier, 2 GPUs |",
        "| ---: | ---: | ---: | ---: | ---: |",
        "| 1,024 | 8 | 4.0 | 3.0 (0.75x) | 2.0 (0.50x) |",
    ]


def test_the_largest_batch_is_of_the_longest_requests(benchmark):
    import argparse

    serve = benchmark("serve")
    args = argparse.Namespace(batches=["1", "8", "fit"], max_prefill=1 << 22)
    found = list(serve.cases(args, 32768, 400_000))
    assert found[-1] == (32768, 12, True)
    assert [(c, b) for c, b, is_fit in found if not is_fit] == [
        (c, b) for c in (1024, 8192, 32768) for b in (1, 8)
    ]
