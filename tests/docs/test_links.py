"""Relative links of every page lead to a file, and to a heading of it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.docs.markdown import ROOT, anchors, links, pages


def broken(page: Path, link: str) -> str:
    """What is wrong with a link; empty where nothing is."""
    target, _, anchor = unquote(link).partition("#")
    if "://" in target or target.startswith("mailto:"):
        return ""
    file = (page.parent / target).resolve() if target else page
    if not file.is_relative_to(ROOT):
        return f"{link} leaves the repository"
    if not file.exists():
        return f"{link} does not exist"
    if anchor and file.suffix == ".md" and anchor not in anchors(file):
        return f"{link}: {file.name} has no such heading"
    return ""


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not [reason for link in links(page) if (reason := broken(page, link))]


def test_a_broken_link_is_noticed(tmp_path: Path) -> None:
    readme = ROOT / "README.md"
    assert broken(readme, "docs/no-such-page.md").endswith("does not exist")
    assert broken(readme, "#no-such-heading").endswith("has no such heading")
    assert broken(readme, "../elsewhere").endswith("leaves the repository")
    assert not broken(readme, "run")
