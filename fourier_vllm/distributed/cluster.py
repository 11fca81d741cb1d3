"""What the Ray cluster has, and one engine's share of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec

# a batch reads, filters and writes with them, a deployment takes requests in
RESERVED_CPUS = 2

# the last line of a traceback that says what happened; Ray's own wrappers say only where
REASON = re.compile(
    r"^ *(?!ray\.exceptions)(?:\S*(?:Error|Exception): |Value error, )(.+?)(?: \[type=.*)?$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Share:
    """Ray resources of one engine."""

    num_cpus: float
    num_gpus: float


def require() -> None:
    """Refuse when Ray is not installed."""
    if find_spec("ray") is None or find_spec("pyarrow") is None:
        raise ValueError("Ray is not installed: pip install 'fourier-vllm[ray]'.")


def connect() -> None:
    """Join the cluster of RAY_ADDRESS or of `ray start`, else start one on this machine."""
    import ray

    if not ray.is_initialized():
        ray.init()


def share(replicas: int, devices: int) -> Share:
    """What each of `replicas` engines with `devices` ranks takes of the cluster we are in.

    Raises
    ------
    ValueError
        When the cluster has fewer GPUs than the engines need; Ray would wait for ever.
    """
    import ray

    have = ray.cluster_resources()
    gpus = int(have.get("GPU", 0))
    if gpus == 0:
        each = max(0.0, have.get("CPU", 0) - RESERVED_CPUS) / replicas
        return Share(num_cpus=float(int(each)) if each >= 1 else each, num_gpus=0)
    if replicas * devices > gpus:
        raise ValueError(
            f"{replicas} replicas of {devices} GPUs need {replicas * devices}, the Ray cluster has "
            f"{gpus}: lower --replicas or --tensor-parallel-size, or add nodes."
        )
    return Share(num_cpus=0, num_gpus=devices)


def reason(text: str) -> str:
    """What went wrong in another process, in one line of the `text` that Ray brought."""
    found = REASON.findall(text)
    return found[-1] if found else text
