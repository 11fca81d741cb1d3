"""Two examples as a user runs them, each in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path


def stdout(root: Path, smollm2: Path, name: str) -> str:
    command = [sys.executable, root / "examples" / name, "--model", smollm2]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_offline(root: Path, smollm2: Path) -> None:
    out = stdout(root, smollm2, "offline.py")
    (tokens,) = re.findall(r"the KV cache holds ([\d,]+) in 256 MiB", out)
    assert int(tokens.replace(",", "")) > 3 * 11_650  # what raw K and V would hold
    assert "bluebird" in out


def test_multi_turn(root: Path, smollm2: Path) -> None:
    out = stdout(root, smollm2, "multi_turn.py")
    turns = [
        [int(number.replace(",", "")) for number in pair]
        for pair in re.findall(r"turn \d: ([\d,]+) prompt tokens, ([\d,]+) of them", out)
    ]
    assert len(turns) == 3
    assert turns[0][1] == 0
    for (before, _), (prompt, cached) in pairwise(turns):
        assert prompt > before
        assert before - 512 < cached < prompt  # all but the window and a page of the turn before
