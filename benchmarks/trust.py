"""What was compared with stock vLLM, beside it in the same situation: benchmarks/results/trust.json.

    python -m pytest -m gpu tests/e2e --junitxml junit.xml
    python -m benchmarks.trust junit.xml [needles.json ...]

A row is {vllm, gpu, what, stock, ours, equal, commit}. From tests: digests of the tokens, and whether the
test passed. From `benchmarks/needles.py`: right answers, and whether ours are within 1 of 16, 2 of 32 or 48,
or 3 of 64 of stock's. A row replaces that of the same vLLM, GPU and situation.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.record import RESULTS, load, model_of, save
from fourier_vllm.evaluation.machine import commit, machine, versions

ALLOWED = {16: 1, 32: 2, 48: 2, 64: 3}  # answers that may differ, of so many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "files", nargs="+", type=Path, help="junit XML of pytest, JSON of needles.py"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "trust.json")
    args = parser.parse_args()
    rows = {key(row): row for row in load(args.out)} if args.out.exists() else {}
    for file in args.files:
        read = from_tests if file.suffix == ".xml" else from_needles
        rows |= {key(row): row for row in read(file)}
    save(args.out, [rows[k] for k in sorted(rows)])


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["vllm"], row["gpu"], row["what"]


def from_tests(file: Path) -> Iterator[dict[str, Any]]:
    """Tests that recorded what stock and ours gave, run on this machine with this vLLM."""
    import torch

    found = machine("cuda" if torch.cuda.is_available() else "cpu")
    for case in ElementTree.parse(file).iter("testcase"):
        recorded = {p.get("name"): p.get("value") for p in case.iter("property")}
        if {"stock", "ours"} <= recorded.keys():
            yield {
                "vllm": versions("vllm")["vllm"],
                "gpu": found["device"],
                "what": f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}",
                "stock": recorded["stock"],
                "ours": recorded["ours"],
                "equal": case.find("failure") is None and case.find("error") is None,
                "commit": commit(),
            }


def from_needles(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of a run of `benchmarks/needles.py`, which has stock's first."""
    result = load(file)
    found, rows = result["machine"], result["rows"]
    stock = {row["context_tokens"]: row["right"] for row in rows if row["engine"] == "stock"}
    for row in rows:
        if row["engine"] == "stock":
            continue
        tokens = row["context_tokens"]
        yield {
            "vllm": found["vllm"],
            "gpu": found["device"],
            "what": f"needles of {row['questions']}, {model_of(result)}, {tokens} tokens,"
            f" {row['engine']}",
            "stock": stock[tokens],
            "ours": row["right"],
            "equal": row["right"] >= stock[tokens] - ALLOWED[row["questions"]],
            "commit": found["commit"],
        }


if __name__ == "__main__":
    main()
