"""Just enough of Markdown to check the pages of the repository: headings, links, code blocks, tables."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^( *)(`{3,}|~{3,})\s*(\S*)[^\n]*$")
MARKER = re.compile(r"<!--\s*not run:\s*(.+?)\s*-->")
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)\s>]*)>?(?:\s+\"[^\"]*\")?\s*\)")
SOURCE = re.compile(r"\b(?:src|href|srcset)=\"([^\"]+)\"")
CODE = re.compile(r"(`+)(.+?)\1")


class Block(NamedTuple):
    """A fenced code block.

    Attributes
    ----------
    page : Path
        The file.
    line : int
        Number of the line after the opening fence, from 1.
    language : str
        Info string up to the first blank; empty where none is given.
    text : str
        The lines between the fences, indentation of the fence removed.
    excuse : str or None
        Why the block is not checked: `<!-- not run: WHY -->` on the line before the fence.
    """

    page: Path
    line: int
    language: str
    text: str
    excuse: str | None

    @property
    def id(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@cache
def pages() -> tuple[Path, ...]:
    """Every Markdown file of the repository but what `eval` wrote, in order."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        names = listed.stdout.splitlines()
    else:  # no clone: an unpacked archive
        names = [*map(str, ROOT.glob("*.md")), *map(str, ROOT.glob("[!.]*/**/*.md"))]
    files = (ROOT / name for name in names if "benchmarks/results/" not in name)
    return tuple(sorted(file for file in files if file.is_file()))


def blocks(page: Path) -> Iterator[Block]:
    """The fenced code blocks of a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    opened: re.Match[str] | None = None
    start = 0
    for i, line in enumerate(lines):
        match = FENCE.match(line)
        if opened is None and match:
            opened, start = match, i + 1
        elif opened and match and match[2].startswith(opened[2]) and not match[3]:
            above = next((x for x in reversed(lines[: start - 1]) if x.strip()), "")
            marker = MARKER.fullmatch(above.strip())
            text = "\n".join(x.removeprefix(opened[1]) for x in lines[start:i])
            yield Block(page, start + 1, opened[3], text, marker and marker[1])
            opened = None
    assert opened is None, f"{page}: a code block is not closed"


def prose(page: Path) -> str:
    """The page without its fenced code blocks."""
    kept, fence = [], None
    for line in page.read_text(encoding="utf-8").splitlines():
        match = FENCE.match(line)
        if fence is None and match:
            fence = match[2]
        elif fence and match and match[2].startswith(fence) and not match[3]:
            fence = None
        elif fence is None:
            kept.append(line)
    return "\n".join(kept)


def links(page: Path) -> list[str]:
    """Targets of links and pictures, in Markdown and in HTML, outside code."""
    text = CODE.sub("`code`", prose(page))
    return [*LINK.findall(text), *SOURCE.findall(text)]


@cache
def anchors(page: Path) -> frozenset[str]:
    """What `page#...` may name: headings as GitHub and Python-Markdown name them, ids and names in HTML."""
    text = prose(page)
    found: dict[str, int] = {}
    names = set(re.findall(r"\b(?:id|name)=\"([^\"]+)\"", text))
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", text, re.MULTILINE):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")
        number = found.get(slug, 0)
        found[slug] = number + 1
        names.add(f"{slug}-{number}" if number else slug)
    return frozenset(names)


def code_spans(page: Path) -> list[str]:
    """Inline code of the page's prose."""
    return [text for _, text in CODE.findall(prose(page))]
