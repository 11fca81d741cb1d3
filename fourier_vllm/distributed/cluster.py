"""What the Ray cluster has, and one engine's share of it."""

from __future__ import annotations

from dataclasses import dataclass

RESERVED_CPUS = (
    2  # for reading, filtering and writing in a batch, for the HTTP ingress in a deployment
)


@dataclass(frozen=True)
class Share:
    """Ray resources of one engine."""

    num_cpus: float
    num_gpus: float


def connect() -> None:
    """Join the cluster of RAY_ADDRESS or of `ray start`, else start one on this machine."""
    try:
        import ray
    except ImportError as error:
        raise ValueError("Ray is not installed: pip install 'fourier-vllm[ray]'.") from error
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
