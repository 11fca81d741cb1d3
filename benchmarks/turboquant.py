"""Decode attention of one layer with vLLM's in-tree TurboQuant, for benchmarks/attention.py to compare with.

The preset is `turboquant_4bit_nc`: 4-bit keys, rotated and with a norm, and 4-bit values with scale and zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from benchmarks.attention import Timer

PRESET, BLOCK, DISTINCT_BLOCKS = "turboquant_4bit_nc", 16, 64


def decode_step(Hq: int, H: int, D: int, batch: int, context: int) -> Callable[[], None]:
    """What `TurboQuantAttentionImpl.forward` launches for a batch of decodes on an NVIDIA GPU.

    The interleaved cache with the kernels of `triton_turboquant_decode` is what every CUDA device gets;
    the kernels in `turboquant_soa` serve only AMD's gfx950.
    """
    from vllm.config import AttentionConfig
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention
    from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

    config = TurboQuantConfig.from_cache_dtype(PRESET, D)
    formats = {
        "mse_bits": config.key_mse_bits,
        "key_packed_size": config.key_packed_size,
        "value_quant_bits": config.effective_value_quant_bits,
        "key_fp8": config.key_fp8,
    }
    centroids = get_centroids(D, config.centroid_bits).to("cuda", torch.float32)
    middles = (centroids[:-1] + centroids[1:]) / 2
    hadamard = torch.ones(1, 1)
    while len(hadamard) < D:
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
    hadamard = (hadamard / D**0.5).cuda()

    slots = torch.arange(DISTINCT_BLOCKS * BLOCK, device="cuda")
    k, v = torch.randn(2, len(slots), H, D, device="cuda", dtype=torch.bfloat16)
    distinct = torch.zeros(
        DISTINCT_BLOCKS, BLOCK, H, config.slot_size_aligned, dtype=torch.uint8, device="cuda"
    )
    triton_turboquant_store(k, v, distinct, slots, hadamard, middles, **formats)
    per = -(-context // BLOCK)
    cache = distinct[torch.arange(batch * per, device="cuda") % DISTINCT_BLOCKS]
    table = torch.randperm(batch * per, device="cuda").view(batch, per).int()
    lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")

    q = torch.randn(batch, Hq, D, device="cuda", dtype=torch.bfloat16)
    output = torch.empty_like(q)
    # The backend takes these three from vLLM's workspace; the rotated queries it allocates each step
    splits = AttentionConfig().tq_max_kv_splits_for_cuda_graph
    acc = torch.empty(batch, Hq, splits, D + 1, device="cuda")
    result = torch.empty_like(q)
    lse = torch.empty(batch, Hq, device="cuda")

    def step() -> None:
        output[:batch] = triton_turboquant_decode_attention(
            query=q, kv_cache=cache, block_table=table, seq_lens=lens, Pi=hadamard, PiT=hadamard,
            centroids=centroids, scale=D**-0.5, norm_correction=config.norm_correction,
            mid_o_buf=acc, output_buf=result, lse_buf=lse, max_num_kv_splits=splits, **formats,
        )  # fmt: skip

    return step


def turboquant(timer: Timer, Hq: int, H: int, D: int, batch: int, context: int) -> float | None:
    """Microseconds of one step; None where vLLM's TurboQuant is missing or does not run."""
    try:
        return timer(decode_step(Hq, H, D, batch, context))[0]
    except Exception as error:  # Triton's errors share no base class with CUDA's
        print(f"TurboQuant does not run: {type(error).__name__}: {error}".splitlines()[0])
        return None
