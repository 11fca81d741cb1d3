"""Engine options of `vllm serve`, read by vLLM's own parser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def parse(arguments: Sequence[str], command: str) -> dict[str, Any]:
    """Return what `arguments` set, by the names that `vllm.LLM` takes.

    The attention backend is `fourier` unless another was asked for. vLLM's parser ends the
    process with its usual message on an argument that it does not know.

    Parameters
    ----------
    arguments
        As after `vllm serve MODEL`, without options of the HTTP server.
    command
        Who asks, for that message.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog=f"fourier-vllm {command} MODEL --", add_help=False)
    EngineArgs.add_cli_args(parser)
    defaults = vars(parser.parse_args([]))
    given = {
        name: value
        for name, value in vars(parser.parse_args(list(arguments))).items()
        if value != defaults[name]
    }
    if "model" in given:
        raise ValueError(
            f"--model after `--` names a second model: give it once, as {command} MODEL."
        )
    return {"attention_backend": "fourier"} | given


def devices(options: dict[str, Any]) -> int:
    """Accelerators that one engine with these options takes."""
    return int(options.get("tensor_parallel_size") or 1) * int(
        options.get("pipeline_parallel_size") or 1
    )
