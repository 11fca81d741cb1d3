"""Runs a step of one layer on the reference codec: store, seal, attend, in this order over the batch.

Prefix caching publishes a page in the step that computes its last token, so another request of the same
batch may read it: everything is stored and sealed before anybody attends.
"""

from __future__ import annotations

import torch

from fourier_vllm.engine.cpu.cells import load, store
from fourier_vllm.engine.cpu.plan import DecodeStep, StepPlan, plan_tokens
from fourier_vllm.engine.cpu.prompts import prompt_attention
from fourier_vllm.engine.metadata import FourierMetadata
from fourier_vllm.kernels.cpu import decode as decode_cpu
from fourier_vllm.kernels.reference.codec import PageCodec
from fourier_vllm.page import PageLayout
from fourier_vllm.window import Window


class CpuPath:
    """Codec and sizes of one layer."""

    def __init__(
        self,
        layout: PageLayout,
        window: Window,
        scale: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.codec, self.window, self.scale = PageCodec(layout, dtype, device), window, scale
        decode_cpu.warm_up(self.codec, dtype)

    def prepare(self) -> None:
        """A step's scratch is small."""

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        pages: torch.Tensor,
        local: torch.Tensor,
        metadata: FourierMetadata,
        local_metadata: FourierMetadata,
    ) -> None:
        """One layer of one step."""
        plan = local_metadata.plan
        if plan is None:
            plan = local_metadata.plan = plan_of(self.window, metadata, local_metadata)
        sink_tokens = self.window.sink_tokens
        run_step(self.codec, plan, q, k, v, out, pages[:, 0, 0], local, self.scale, sink_tokens)


def plan_of(window: Window, metadata: FourierMetadata, local_metadata: FourierMetadata) -> StepPlan:
    """The plan of a step, from the metadata of the two caches."""
    return plan_tokens(
        window,
        metadata.query_start_loc,
        metadata.seq_lens,
        metadata.is_prefilling.to(metadata.seq_lens.device),
        metadata.block_table,
        local_metadata.block_table,
        local_metadata.slot_mapping,
    )


def run_step(
    codec: PageCodec,
    plan: StepPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    output: torch.Tensor,
    pages: torch.Tensor,
    local: torch.Tensor,
    scale: float,
    sink_tokens: int,
) -> None:
    """One layer of one step whose plan is made; `pages [blocks, page_bytes]`."""
    store(local, plan.store_cells, k[plan.store], v[plan.store])
    if plan.seal is not None:
        done = plan.seal
        k_page, v_page = k[done.token], v[done.token]  # [P, W, H, D]
        if not bool(done.in_flight.all()):
            k_old, v_old = load(local, done.cells)
            fresh = done.in_flight[..., None, None]
            k_page = torch.where(fresh, k_page, k_old.to(k.dtype))
            v_page = torch.where(fresh, v_page, v_old.to(v.dtype))
        pages[done.page] = codec.seal(k_page, v_page, done.num_pinned)
    if plan.decode is not None:
        out = attend_decodes(codec, plan.decode, q, pages, local, scale, sink_tokens)
        output[plan.decode.query] = out.flatten(1, 2).to(output.dtype)
    for p in plan.prefill:
        k_raw, v_raw = load(local, p.cells)
        k_page, v_page = (x.flatten(0, 1) for x in codec.reconstruct(pages.index_select(0, p.page)))
        k_context = torch.cat([k_page[p.num_skipped :].to(k_raw.dtype), k_raw])
        v_context = torch.cat([v_page[p.num_skipped :].to(v_raw.dtype), v_raw])
        chunk = slice(p.start, p.stop)
        output[chunk] = prompt_attention(
            q[chunk], k_context, v_context, k[chunk], v[chunk], scale
        ).to(output.dtype)


def attend_decodes(
    codec: PageCodec,
    step: DecodeStep,
    q: torch.Tensor,
    pages: torch.Tensor,
    local: torch.Tensor,
    scale: float,
    sink_tokens: int,
) -> torch.Tensor:
    """`[N, H, G, D]` of the requests with one query token."""
    return decode_cpu.decode_attention(
        codec,
        q[step.query].unflatten(1, (local.shape[1], -1)),
        pages,
        step.page,
        step.page_start,
        sink_tokens,
        local,
        step.block,
        step.raw_mask,
        scale,
    )
