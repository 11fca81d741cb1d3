"""Replicas of one model behind one OpenAI-compatible address, by Ray Serve's own LLM application."""

from __future__ import annotations

import signal
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fourier_vllm.distributed import cluster, vllm_options

NAME = "fourier"  # of the Serve application
MIN_CPUS = 0.1  # Ray refuses a bundle of nothing


@dataclass(frozen=True)
class Options:
    """What `fourier-vllm deploy` was asked for."""

    model: str
    replicas: int = 1
    host: str = "127.0.0.1"
    port: int = 8000
    vllm_args: list[str] = field(default_factory=list)


def run(options: Options) -> int:
    """Serve until Ctrl-C; returns the exit code."""
    if options.replicas < 1:
        raise ValueError("--replicas must be 1 or more.")
    cluster.require()
    engine = vllm_options.parse(options.vllm_args, "deploy")
    cluster.connect()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `finally` runs
    share = cluster.share(options.replicas, vllm_options.devices(engine))
    from ray import serve

    serve.start(http_options=serve.HTTPOptions(host=options.host, port=options.port))
    try:
        _start(_application(options, engine, share))
        print(f"serving at http://{options.host}:{options.port}/v1 until Ctrl-C", flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()
    finally:
        serve.delete(NAME)
    return 0


def _start(application: Any) -> None:
    from ray import serve

    try:
        serve.run(application, name=NAME)
    except RuntimeError as error:  # says that it failed; the status says why
        deployments = serve.status().applications[NAME].deployments.values()
        why = "\n".join(deployment.message for deployment in deployments)
        raise ValueError(f"the replicas did not start: {cluster.reason(why)}") from error


def _application(options: Options, engine: dict[str, Any], share: cluster.Share) -> Any:
    from ray.serve.llm import LLMConfig, build_openai_app

    engine = dict(engine)
    names = engine.pop("served_model_name", None) or options.model
    deployment: dict[str, Any] = {"num_replicas": options.replicas}
    placement = None  # Ray's own: a GPU a rank
    if share.num_gpus == 0:
        deployment["ray_actor_options"] = {"num_cpus": 0}  # what the bundle has is the engine's
        placement = {"bundles": [{"CPU": max(MIN_CPUS, share.num_cpus)}]}
    config = LLMConfig(
        model_loading_config={
            "model_id": names if isinstance(names, str) else names[0],
            "model_source": options.model,
        },
        engine_kwargs=engine,
        deployment_config=deployment,
        placement_group_config=placement,
    )
    return build_openai_app({"llm_configs": [config]})
