"""The documentation site builds without a warning, where mkdocs is installed."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from tests.docs.markdown import ROOT


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without importing what it names."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def test_nav_lists_every_page() -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)
    sections = [x for part in config["nav"] for x in part.values()]
    nav = {page for x in sections for page in ([x] if isinstance(x, str) else x)}
    docs = ROOT / "docs"
    assert {page.relative_to(docs).as_posix() for page in docs.rglob("*.md")} <= nav
    assert all((docs / page).exists() or (ROOT / page).exists() for page in nav - {"index.md"})


@pytest.mark.parametrize(
    "name",
    [
        ".pre-commit-config.yaml",
        "CITATION.cff",
        *(f".github/ISSUE_TEMPLATE/{x}.yml" for x in ("bug", "model", "config")),
    ],
)
def test_yaml_is_sound(name: str) -> None:
    assert yaml.safe_load((ROOT / name).read_text())


@pytest.mark.skipif(
    not (find_spec("mkdocs") and find_spec("material")), reason="needs fourier-vllm[docs]"
)
def test_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "use/quickstart/index.html").is_file()
