"""Rules of the repository that no linter checks."""

from __future__ import annotations

import subprocess
from pathlib import Path

MOST_LINES = 400
LONGER = {"kernels/cpu/compiled.py"}


def test_files_are_short(root: Path) -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    files = [name for name in listed.split() if name not in LONGER and (root / name).is_file()]
    assert files
    long = {name: len((root / name).read_text().splitlines()) for name in files}
    assert {name: lines for name, lines in long.items() if lines > MOST_LINES} == {}
