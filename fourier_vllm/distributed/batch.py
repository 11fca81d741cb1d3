"""An offline batch on Ray Data: every request of a file gets one row, once."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fourier_vllm.distributed import cluster, requests, vllm_options
from fourier_vllm.distributed.answering import Answering
from fourier_vllm.distributed.output import Output


@dataclass(frozen=True)
class Options:
    """What `fourier-vllm batch` was asked for."""

    model: str
    input: Path
    output: Path
    replicas: int = 1
    batch_size: int = 128  # requests
    max_tokens: int = 256
    temperature: float = 0.0
    vllm_args: list[str] = field(default_factory=list)


def run(options: Options) -> int:
    """Answer what is not answered yet; returns the exit code, 1 while a request has no row."""
    for name in ("replicas", "batch_size", "max_tokens"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more.")
    if options.temperature < 0:
        raise ValueError("--temperature must be 0 (greedy) or more.")
    cluster.require()
    source, output = options.input.absolute(), Output(options.output.absolute())
    found = requests.scan(source)
    digests = {request.id: request.digest for request in found}
    engine = _engine(options)
    with output.open(_job(options)):
        before = output.settle(digests)
        print(f"{len(found):,} requests, {len(before.answered):,} answered before", flush=True)
        if before.replaced:
            print(
                f"{before.replaced:,} lines went to {output.replaced}: they are damaged, or not known "
                "to answer the requests as they are now",
                flush=True,
            )
        missing = [request for request in found if request.id not in before.answered]
        if missing:
            _answer(options, engine, source, requests.cut(missing, options.batch_size), output)
        after = output.settle(digests)
        others = f", beside {after.others:,} for other inputs" if after.others else ""
        print(
            f"{len(after.answered):,} answers in {output.answers}, {after.errors:,} of them an "
            f"error{others}",
            flush=True,
        )
    left = len(found) - len(after.answered)
    if left:
        print(
            f"fourier-vllm batch: {left:,} of {len(found):,} requests have no answer; the same "
            "command goes on from there.",
            file=sys.stderr,
        )
    return 1 if left else 0


def _answer(
    options: Options,
    engine: dict[str, Any],
    source: Path,
    batches: list[requests.Batch],
    output: Output,
) -> None:
    cluster.connect()
    import ray.data

    share = cluster.share(options.replicas, vllm_options.devices(engine))
    sampling = {"max_tokens": options.max_tokens, "temperature": options.temperature}
    answers = ray.data.read_datasource(
        requests.datasource(source, batches), override_num_blocks=len(batches)
    ).map_batches(
        Answering,
        fn_constructor_kwargs={"engine": engine, "sampling": sampling},
        batch_size=None,  # a block is a batch
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=options.replicas),
        num_cpus=share.num_cpus,
        num_gpus=share.num_gpus,
    )
    try:
        answers.write_json(str(output.answers), force_ascii=False)
    except ray.exceptions.RayError as error:
        raise ValueError(
            f"a replica failed: {cluster.reason(str(error))}\n"
            "What is answered is kept; the same command goes on from there."
        ) from error


def _engine(options: Options) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM`."""
    given = vllm_options.parse(options.vllm_args, "batch")
    if given.get("distributed_executor_backend") == "ray":
        raise ValueError(
            "--distributed-executor-backend ray spreads one engine over nodes, a batch keeps each "
            "replica on one: leave it out."
        )
    if vllm_options.devices(given) > 1:
        given.setdefault("distributed_executor_backend", "mp")  # inside Ray vLLM would take Ray
    return given | {"model": options.model}


def _job(options: Options) -> dict[str, Any]:
    """What makes answers comparable."""
    return {
        "model": options.model,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "vllm_args": options.vllm_args,
    }
