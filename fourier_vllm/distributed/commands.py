"""Arguments of `fourier-vllm batch` and `fourier-vllm deploy`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_batch(commands: Commands) -> None:
    """Add `batch`."""
    text = "answer a file of requests with Ray Data; started again it goes on where it stopped"
    parser = commands.add_parser("batch", help=text, description=text)
    _add_common(parser)
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        metavar="FILE",
        help='JSON lines, each with "id" and either "prompt" or "messages"',
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="answers go to DIR/answers"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=128,
        metavar="N",
        help="requests an engine takes at once, and rows of an output file; default: %(default)s",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=256,
        metavar="N",
        help="of an answer; default: %(default)s",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="default: %(default)s, greedy"
    )
    _add_vllm_args(parser)
    parser.set_defaults(run=_batch)


def _batch(args: argparse.Namespace) -> int:
    from fourier_vllm.distributed.batch import Options, run

    return run(
        Options(
            model=args.model,
            input=args.input,
            output=args.output,
            replicas=args.replicas,
            batch_size=args.batch_size,
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            vllm_args=args.vllm_args,
        )
    )


def add_deploy(commands: Commands) -> None:
    """Add `deploy`."""
    text = "serve replicas behind one OpenAI-compatible address with Ray Serve"
    parser = commands.add_parser("deploy", help=text, description=text)
    _add_common(parser)
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    _add_vllm_args(parser)
    parser.set_defaults(run=_deploy)


def _deploy(args: argparse.Namespace) -> int:
    from fourier_vllm.distributed.deploy import Options, run

    return run(
        Options(
            model=args.model,
            replicas=args.replicas,
            host=args.host,
            port=args.port,
            vllm_args=args.vllm_args,
        )
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hugging Face folder or Hub id")
    parser.add_argument(
        "--replicas", type=int, default=1, metavar="N", help="engines; default: %(default)s"
    )


def _add_vllm_args(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "vllm_args", nargs="*", metavar="-- VLLM ARGS", help="engine options of `vllm serve`"
    )
