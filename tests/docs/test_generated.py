"""Pages that show options, targets and commands show those that the code has."""

from __future__ import annotations

from pathlib import Path

import pytest

from fourier_vllm.cli import build_parser
from fourier_vllm.config import FourierConfig
from fourier_vllm.recipe import TARGETS
from tools import docs


@pytest.mark.parametrize("page", docs.pages(), ids=lambda page: page.name)
def test_generated_parts_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert docs.fill(text) == text, "run `python tools/docs.py`"


def test_every_part_has_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in docs.pages())
    assert [name for _, name, _ in docs.PART.findall(text)] == ["commands", "options", "targets"]


def test_a_stale_page_is_noticed() -> None:
    page = "<!-- generated: options -->\n| an option that is gone |\n<!-- end -->\n"
    assert docs.fill(page) != page


def test_nothing_is_left_out() -> None:
    options, targets, commands = (docs.PARTS[name]() for name in ("options", "targets", "commands"))
    assert all(f"`{name}`" in options for name in FourierConfig.__dataclass_fields__)
    assert all(f"`{name}`" in targets for name in TARGETS)
    usage = build_parser().format_help()
    for section in commands.split("\n## "):
        assert section.removeprefix("## ").split("\n")[0] in usage
