"""Attention's part of a decode step as the engine launches it, beside FlashAttention 3 with storing.

    python -m benchmarks.layer [--out FILE]

Needs a GPU. A CUDA graph of 32 layers of Llama-3.1-8B's shape, each with caches of its own, replayed after L2
was overwritten; microseconds a layer, median of the replays. The launches of a layer are timed alone too, as
graphs of 32. No request completes a page.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.v1.worker.workspace import init_workspace_manager
from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

from benchmarks.attention import BLOCK, SHAPES, SINKS, WINDOW, Decode, Timer, W
from benchmarks.record import RESULTS, save
from fourier_vllm.engine.gpu.path import GpuPath
from fourier_vllm.engine.gpu.prompt_attention import TorchAttention
from fourier_vllm.engine.metadata import FourierMetadata
from fourier_vllm.evaluation.machine import commit, versions
from fourier_vllm.kernels.gpu.decode import attend_pages
from fourier_vllm.kernels.gpu.decode_raw import attend_raw
from fourier_vllm.kernels.gpu.join import join_parts
from fourier_vllm.kernels.gpu.query_columns import query_columns
from fourier_vllm.kernels.gpu.seal import seal
from fourier_vllm.kernels.gpu.step import Layer
from fourier_vllm.window import Window

SHAPE, LAYERS = "llama-3.1-8b", 32
CASES = ((1, 1088), (8, 1088), (32, 1088), (32, 4160), (1, 32704), (8, 32704))
MAX_MODEL_LEN, MAX_NUM_SEQS, MAX_NUM_TOKENS = 32768, 160, 8192
MAX_SPLITS = 32  # of FlashAttention's work in CUDA graphs, vLLM's default


class Fourier:
    """The plugin's layers; every request has `context` tokens."""

    def __init__(self, batch: int, context: int) -> None:
        Hq, H, D = SHAPES[SHAPE]
        case = self.case = Decode(Hq, H, D, batch, context)
        window = Window(
            page_size=W, local_window=WINDOW, sink_tokens=SINKS, block_size=BLOCK,
            exact_prefill=False,
        )  # fmt: skip
        self.path = GpuPath(
            case.layout, window, TorchAttention(case.scale), Hq, case.scale, case.q.dtype,
            case.q.device, MAX_MODEL_LEN, MAX_NUM_SEQS, MAX_NUM_TOKENS,
        )  # fmt: skip
        self.caches = [
            (case.pages.clone()[:, None, None], case.local.clone()) for _ in range(LAYERS)
        ]
        self.k, self.v = torch.randn(2, batch, H, D, device="cuda").to(case.q.dtype)
        self.seq_lens_cpu, self.starts_cpu = case.seq_lens.cpu(), case.starts.cpu()
        self.slots = torch.zeros_like(case.slots)
        # Tables are as wide as the longest request's.
        self.page_table, self.table = (
            torch.nn.functional.pad(table, (0, MAX_MODEL_LEN // size - table.shape[1]))
            for table, size in ((case.page_table, W), (case.table, BLOCK))
        )

    def metadata(self) -> tuple[FourierMetadata, FourierMetadata]:
        """Of a step that has not been planned yet, pages first."""
        case = self.case

        def metadata(table: torch.Tensor, slots: torch.Tensor) -> FourierMetadata:
            common = SimpleNamespace(
                num_reqs=len(case.seq_lens),
                query_start_loc=case.starts,
                seq_lens=case.seq_lens,
                is_prefilling=self.starts_cpu[1:] < 0,
                block_table_tensor=table,
                slot_mapping=slots,
                query_start_loc_cpu=self.starts_cpu,
                seq_lens_cpu_upper_bound=self.seq_lens_cpu,
            )
            return FourierMetadata(common)

        return metadata(self.page_table, self.slots), metadata(self.table, case.slots)

    def layers(self) -> None:
        both = self.metadata()
        for pages, local in self.caches:
            self.path.run(self.case.q, self.k, self.v, self.case.out, pages, local, *both)

    def launches(self, which: str) -> None:
        """One launch of every layer."""
        path, q, k, v = self.path, self.case.q, self.k, self.v
        plan = path.plan(*self.metadata(), len(k))
        parts = path.parts(plan.num_decodes)
        for caches in self.caches:
            layer = Layer(path.tables, path.seals, path.scale, *caches)
            work: dict[str, Callable[[], Any]] = {
                "store": partial(seal, layer, plan.step, k, v),
                "columns": partial(query_columns, layer, q, parts),
                "pages": partial(attend_pages, layer, plan.decodes, q, parts),
                "raw": partial(attend_raw, layer, plan.decodes, q, parts),
                "reduce": partial(join_parts, path.tables, parts, self.case.out),
            }
            work[which]()


class Flash:
    """FlashAttention 3 over raw paged KV, as vLLM's backend calls it in graphs of decode steps."""

    def __init__(self, batch: int, context: int) -> None:
        Hq, H, D = SHAPES[SHAPE]
        blocks = -(-context // BLOCK)
        self.caches = [
            torch.randn(2, batch * blocks, BLOCK, H, D, device="cuda", dtype=torch.bfloat16)
            for _ in range(LAYERS)
        ]
        ids = torch.randperm(batch * blocks, device="cuda").view(batch, -1).int()
        self.table = torch.nn.functional.pad(ids, (0, MAX_MODEL_LEN // BLOCK - blocks))
        self.slots = BLOCK * ids[:, -1].long() + (context - 1) % BLOCK
        self.q = torch.randn(batch, Hq, D, device="cuda").to(torch.bfloat16)
        self.k, self.v = torch.randn(2, batch, H, D, device="cuda").to(torch.bfloat16)
        self.out, self.one = torch.empty_like(self.q), torch.ones((), device="cuda")
        self.starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        self.lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        # Made before the graph, once a step.
        self.schedule = get_scheduler_metadata(
            batch_size=batch, max_seqlen_q=1, max_seqlen_k=MAX_MODEL_LEN, num_heads_q=Hq,
            num_heads_kv=H, headdim=D, cache_seqlens=self.lens, qkv_dtype=self.q.dtype,
            cu_seqlens_q=self.starts, page_size=BLOCK, causal=True, num_splits=MAX_SPLITS,
        )  # fmt: skip

    def layers(self) -> None:
        for k_cache, v_cache in self.caches:
            ops.reshape_and_cache_flash(
                self.k, self.v, k_cache, v_cache, self.slots, "auto", self.one, self.one
            )
            flash_attn_varlen_func(
                self.q, k_cache, v_cache, out=self.out, max_seqlen_q=1, cu_seqlens_q=self.starts,
                max_seqlen_k=MAX_MODEL_LEN, seqused_k=self.lens, block_table=self.table,
                causal=True, softmax_scale=self.q.shape[-1] ** -0.5, fa_version=3,
                scheduler_metadata=self.schedule, num_splits=MAX_SPLITS,
            )  # fmt: skip


def measure(timer: Timer, batch: int, context: int) -> dict[str, Any]:
    def a_layer(layers: Callable[[], None]) -> float:
        return round(timer(layers)[0] / LAYERS, 2)

    ours = Fourier(batch, context)
    row = {"batch": batch, "context": context, "layer_us": a_layer(ours.layers)}
    for which in ("store", "columns", "pages", "raw", "reduce"):
        row[f"{which}_us"] = a_layer(partial(ours.launches, which))
    del ours
    row["fa3_us"] = a_layer(Flash(batch, context).layers)
    torch.cuda.empty_cache()
    return row | {"gpu": torch.cuda.get_device_name(), "commit": commit()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "layer.json")
    args = parser.parse_args()
    init_workspace_manager(torch.device("cuda"))
    timer, rows = Timer(), []
    for case in CASES:
        rows.append(measure(timer, *case) | versions("vllm", "triton"))
        print(rows[-1], flush=True)
        save(args.out, rows)


if __name__ == "__main__":
    main()
