"""Pages for developers name files that exist."""

from __future__ import annotations

import re

import pytest

from tests.docs.markdown import ROOT, code_spans, prose

FOLDERS = sorted(path.name for path in ROOT.iterdir() if path.is_dir())
NAMED = re.compile(
    rf"(?:{'|'.join(map(re.escape, FOLDERS))})(?:/[\w.*-]+)+/?|[\w-]+\.(?:toml|cff|yaml|md)"
)


def paths(text: str) -> set[str]:
    """Paths from the repository's root among inline code."""
    words = {
        word.split("::")[0].rstrip(",;")
        for span in re.findall(r"`([^`]+)`", text)
        for word in span.split()
    }
    return {word for word in words if NAMED.fullmatch(word)}


@pytest.mark.parametrize("name", ["docs/develop/ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_paths_exist(name: str) -> None:
    page = ROOT / name
    named = paths(prose(page))
    assert len(named) > 20, code_spans(page)
    assert not {path for path in named if not any(ROOT.glob(path))}


def test_a_path_is_told_from_other_code() -> None:
    text = "`kernels/gpu/no_such_kernel.py` `forward` `pytest tests/nowhere.py::test_x` `a/b`"
    assert paths(text) == {"kernels/gpu/no_such_kernel.py", "tests/nowhere.py"}
