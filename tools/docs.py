"""Writes the tables of the docs that the code decides: options, targets, commands.

    python tools/docs.py [--check]

A part goes between the marks `<!-- generated: NAME -->` and `<!-- end -->` of a page in docs/use/. `--check`
writes nothing and exits with 1 where a page differs.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from fourier_vllm.cli import build_parser  # noqa: E402
from fourier_vllm.config import options  # noqa: E402
from fourier_vllm.recipe import MEASURED_TARGET, PREDICTED_TARGET, TARGETS  # noqa: E402

PART = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of text."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def options_table() -> str:
    """Options of `--additional-config`, as `FourierConfig` has them."""
    rows = [(f"`{o.name}`", o.default, o.values, o.help.rstrip(".")) for o in options()]
    return table(("option", "default", "values", "meaning"), rows)


def targets_table() -> str:
    """Named targets, and where each is the default."""
    default = {
        MEASURED_TARGET: "a measured recipe",
        PREDICTED_TARGET: "bits predicted from the weights",
    }
    rows = [(f"`{name}`", target.help, default.get(name, "")) for name, target in TARGETS.items()]
    return table(("target", "pages", "the default with"), rows)


def commands() -> str:
    """Every subcommand with its arguments, as argparse has them."""
    return "\n\n".join(_command(name, sub, "##") for name, sub in _subcommands(build_parser()))


def _subcommands(parser: argparse.ArgumentParser) -> list[tuple[str, argparse.ArgumentParser]]:
    chosen = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [item for action in chosen for item in action.choices.items()]


def _command(name: str, parser: argparse.ArgumentParser, mark: str) -> str:
    actions = [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]
    usage = ["fourier-vllm", name]
    if any(a.option_strings and not a.required for a in actions):
        usage.append("[OPTIONS]")
    usage += [
        f"{a.option_strings[-1]} {_value(a)}" for a in actions if a.option_strings and a.required
    ]
    for action in (a for a in actions if not a.option_strings):
        is_command = action.nargs == argparse.PARSER
        optional = not action.required if is_command else action.nargs in ("?", "*")
        usage.append(f"[{_value(action)}]" if optional else _value(action))
    text = (parser.description or "").strip()
    parts = [f"{mark} {name}", f"{text[:1].upper()}{text[1:]}.", f"```text\n{' '.join(usage)}\n```"]
    rows = list(_arguments(actions))
    if rows:
        parts.append(table(("argument", "meaning"), rows))
    parts += [_command(f"{name} {inner}", sub, f"{mark}#") for inner, sub in _subcommands(parser)]
    return "\n\n".join(parts)


def _arguments(actions: Sequence[argparse.Action]) -> Iterator[tuple[str, str]]:
    for action in actions:
        value = "" if action.nargs == 0 else _value(action)
        names = [f"{name} {value}".rstrip() for name in action.option_strings] or [value]
        notes = [(action.help or "") % {"default": action.default}]
        if action.choices is not None:
            notes.append(f"one of {', '.join(map(str, action.choices))}")
        if (
            isinstance(action.default, str | int | float)
            and action.nargs != 0
            and "default" not in notes[0]
        ):
            notes.append(f"default: {action.default}")
        text = "; ".join(filter(None, notes))
        yield ", ".join(f"`{name}`" for name in names), text


def _value(action: argparse.Action) -> str:
    name = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return f"{name} ..." if action.nargs in ("+", "*") and name[:2] != "--" else name


PARTS: dict[str, Callable[[], str]] = {
    "options": options_table,
    "targets": targets_table,
    "commands": commands,
}


def fill(text: str) -> str:
    """A page with its generated parts as the code gives them."""
    return PART.sub(lambda m: f"{m[1]}{PARTS[m[2]]()}\n{m[3]}", text)


def pages() -> list[Path]:
    """Pages that may have generated parts."""
    return sorted(ROOT.glob("docs/use/*.md"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; 1 where a page differs"
    )
    args = parser.parse_args()
    stale = [page for page in pages() if fill(page.read_text()) != page.read_text()]
    for page in stale:
        print(f"{page.relative_to(ROOT)} {'differs' if args.check else 'written'}")
        if not args.check:
            page.write_text(fill(page.read_text()))
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
