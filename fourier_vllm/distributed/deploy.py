"""Replicas of one model behind one OpenAI-compatible address, by Ray Serve's own LLM application."""

from __future__ import annotations

import signal
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from fourier_vllm.distributed import cluster, vllm_options

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
    """Serve until Ctrl-C; returns the exit code.

    The application and nothing else is deleted at the end, however the end comes.
    """
    if options.replicas < 1:
        raise ValueError("--replicas must be 1 or more.")
    cluster.require()
    engine = vllm_options.parse(options.vllm_args, "deploy")
    cluster.connect()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # so that `finally` runs
    share = cluster.share(options.replicas, vllm_options.devices(engine))
    from ray import serve

    serve.start(http_options=serve.HTTPOptions(host=options.host, port=options.port))
    _check_address(options)
    # Serve takes one application of a name for another's new version: no other has this name.
    name = f"fourier-{uuid4().hex[:8]}"
    try:
        _start(_application(options, engine, share), name)
        print(
            f"serving at http://{options.host}:{options.port}/v1 until Ctrl-C ({name})", flush=True
        )
        with suppress(KeyboardInterrupt):
            signal.pause()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C would leave the replicas behind
        serve.delete(name)
    return 0


def _check_address(options: Options) -> None:
    """Refuse when Serve ran before and listens elsewhere; it ignores a second address."""
    from ray.serve.context import _get_global_client

    found = _get_global_client().http_config
    if (found.host, found.port) != (options.host, options.port):
        raise ValueError(
            f"Ray Serve on this cluster listens at {found.host}:{found.port} already: give --host "
            f"{found.host} --port {found.port}, or end it with `serve shutdown`."
        )


def _start(application: Any, name: str) -> None:
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        serve.run(application, name=name)
    except RayServeException as error:
        if "being used by application" not in str(error):
            raise
        raise ValueError(
            f"this Ray cluster serves another model already ({cluster.reason(str(error))}): end that "
            "deploy first, or start a cluster of your own with RAY_ADDRESS=local and another --port."
        ) from error
    except RuntimeError as error:  # says that it failed; the status says why
        deployments = serve.status().applications[name].deployments.values()
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
