"""Let vLLM's Ray executor run on a CPU: Ray hands out GPUs that do not exist."""

from __future__ import annotations


def allow_cpu_ranks() -> None:
    """In every process of the cluster: vLLM asks Ray for a "GPU" where its CPU platform names none."""
    from vllm.platforms import current_platform

    type(current_platform).ray_device_key = "GPU"


def start(gpus: int) -> None:
    """A cluster of this machine with `gpus` pretended GPUs."""
    import ray

    allow_cpu_ranks()
    ray.init(
        num_cpus=gpus + 1,
        num_gpus=gpus,
        include_dashboard=False,
        runtime_env={"worker_process_setup_hook": "tests.support.pretend.allow_cpu_ranks"},
    )
