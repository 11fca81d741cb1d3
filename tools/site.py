"""Hooks of mkdocs: pages from outside docs/ join the site, links that lead out of docs/ are mended.

Links are written for the repository, where every page and source file has its place. In the site, a link to
another page leads to that page. A link to any other file leads to `repo_url` where mkdocs.yml has one; else
it is plain text.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
HOME = "README.md"
# Files of the repository that are pages of the site, by their place in it.
ADDED = {
    "index.md": HOME,
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "benchmarks/README.md": "benchmarks/README.md",
    "docker/README.md": "docker/README.md",
    "examples/README.md": "examples/README.md",
    "kernels/README.md": "kernels/README.md",
}
# Code passes through as it is; what else looks like a link is one.
LINK = re.compile(
    r"""
    ^(?P<indent>[ ]*)(?P<fence>`{3,})[^\n]*\n.*?^(?P=indent)(?P=fence)[ ]*$
    | (?P<picture>!?)\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\((?P<target>[^)\s#]+)(?P<anchor>\#[^)\s]*)?\)
    | (?<!`)(?P<span>`+)(?!`).+?(?<!`)(?P=span)(?!`)
    """,
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of `ADDED` that exist."""
    for uri, name in ADDED.items():
        if (ROOT / name).exists():
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Mend the page's links, outside code."""
    uri = page.file.src_uri
    source = ADDED.get(uri, f"docs/{uri}")

    def mend(match: re.Match[str]) -> str:
        target, anchor = match["target"], match["anchor"] or ""
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = place_of(path)
        link = f"{match['picture']}[{match['text']}]"
        if files.get_file_from_path(place):
            return f"{link}({posixpath.relpath(place, posixpath.dirname(uri) or '.')}{anchor})"
        if config.repo_url:
            return f"{link}({config.repo_url.rstrip('/')}/blob/HEAD/{path})"
        return match["text"]

    return LINK.sub(mend, markdown)


def place_of(path: str) -> str:
    """Where a file of the repository is in the site, if it is there."""
    added = {name: uri for uri, name in ADDED.items()}
    return added.get(path, path.removeprefix("docs/"))
