"""The lines at start-up: what the plugin does to this engine's memory, and how to get a better recipe."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger

# Below the `vllm` logger, so that vLLM's logging options apply.
logger = init_logger("vllm.fourier_vllm")


def log_capacity(local_spec: Any, num_blocks: int, max_model_len: int, concurrency: float) -> None:
    """Log recipe, source, sealed and plain bytes a token, and tokens the same memory holds.

    Parameters
    ----------
    local_spec : FourierLocalSpec
    num_blocks : int
        Block ids of the pool.
    concurrency : float
        Requests of `max_model_len` tokens that run at once.
    """
    plain = 2 * local_spec.num_kv_heads * local_spec.head_size * local_spec.dtype.itemsize
    sealed = local_spec.page_bytes / local_spec.page_size
    ours = int(concurrency * max_model_len)
    stock = int(num_blocks * local_spec.page_bytes / plain)
    logger.info_once(
        "fourier: recipe %s; sealed pages of %d tokens, %.0f bytes a token and layer instead of "
        "%d (%.2fx smaller); %s raw tokens a request at most; %s tokens at %s a request where "
        "plain K and V would hold %s (%.2fx)",
        local_spec.label,
        local_spec.page_size,
        sealed,
        plain,
        plain / sealed,
        f"{local_spec.sliding_window:,}",
        f"{ours:,}",
        f"{max_model_len:,}",
        f"{stock:,}",
        ours / max(stock, 1),
    )


def log_predicted() -> None:
    """Log the way to a better recipe than the one that follows from the projections."""
    logger.info_once(
        "fourier: bits are predicted from the model's projections, on SmolLM2 with about fifteen times "
        'the KL divergence of a calibrated recipe: set "recipe": "own-text", or run '
        "`fourier-vllm calibrate`"
    )
