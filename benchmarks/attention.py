"""Decode attention of one layer and sealing: ours, the floor, and FlashAttention 3 over raw paged KV.

    python -m benchmarks.attention [--quick] [--out FOLDER]

Needs a GPU. Every time is the median of runs with a cold L2 cache, of a captured graph of all launches;
the floor is the bytes that must be read over the copy bandwidth measured in the same process.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import RESULTS, save
from benchmarks.turboquant import turboquant
from fourier_vllm.calibration.allocate_layer import allocate_bits, page_budget
from fourier_vllm.evaluation.machine import commit, machine, versions
from fourier_vllm.kernels.gpu import decode, decode_raw, seal
from fourier_vllm.kernels.gpu.join import join_parts
from fourier_vllm.kernels.gpu.launch import Launches
from fourier_vllm.kernels.gpu.query_columns import query_columns
from fourier_vllm.kernels.gpu.split import parts_of_pages
from fourier_vllm.kernels.gpu.step import Layer, Parts, Step
from fourier_vllm.kernels.gpu.tables import Tables
from fourier_vllm.page import PageLayout
from fourier_vllm.window import Window

W, SINKS, WINDOW, BLOCK = 128, 16, 256, 16
SHAPES = {
    "llama-3.1-8b": (32, 8, 128),
    "qwen3-like": (64, 8, 128),
    "smollm2-like": (9, 3, 64),
    "8 heads of 8": (8, 8, 128),
}
# Times smaller than raw, and bits of V.
RECIPES = {"balanced": (6.3, 2), "balanced, V at 3 bits": (6.3, 3), "quality": (4.5, 4)}
GOALS = {(8, 32768), (32, 32768), (1, 131072), (128, 4096)}
BATCHES, CONTEXTS = (1, 8, 32, 128), (4096, 32768, 131072)
MAX_BYTES = 40 << 30
DISTINCT_PAGES = 64


class Timer:
    """Median and spread of graph replays, microseconds, each after L2 was overwritten."""

    def __init__(self, repeats: int = 30):
        self.repeats = repeats
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def __call__(self, step: Callable[[], Any]) -> tuple[float, float]:
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        times = []
        for _ in range(self.repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(1000 * begin.elapsed_time(end))
        at = torch.tensor(times).quantile(torch.tensor([0.1, 0.5, 0.9]))
        return float(at[1]), float(at[2] - at[0])


def copy_bandwidth(timer: Timer) -> float:
    """Bytes a microsecond that a large copy moves, read and written ones together."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / timer(lambda: target.copy_(source))[0]


def layout_of(H: int, D: int, recipe: str) -> PageLayout:
    """Pages of a recipe's size, with bits as uneven as calibration makes them."""
    ratio, v_bits = RECIPES[recipe]
    damage = torch.empty(H, D).log_normal_(0, 2, generator=torch.Generator().manual_seed(0))
    budget = page_budget(ratio, W, H, D, v_bits, 4, 8)
    bits = [row for head in damage.chunk(H) for row in allocate_bits(head, budget // H, W).tolist()]
    return PageLayout.build(
        bits, v_bits, head_size=D, page_size=W, coefficients=4, coefficient_bits=8, itemsize=2,
        fragments=True,
    )  # fmt: skip


def window_of(sink_tokens: int) -> Window:
    return Window(W, WINDOW, sink_tokens, BLOCK, exact_prefill=False)


def prompt(starts: Tensor, ids: Tensor, slots: Tensor, sink_tokens: int) -> Step:
    """One request whose tokens are all of this step; every page is sealed into a block of its own."""
    lens = starts[1:]
    return Step(lens, starts, ids, ids, slots, lens, lens, window_of(sink_tokens))


class Decode:
    """One decode step of one layer: every request has `context` tokens."""

    def __init__(self, Hq: int, H: int, D: int, batch: int, context: int, recipe: str = "balanced"):
        self.layout = layout_of(H, D, recipe)
        self.tables = Tables.build(self.layout, "cuda")
        self.scale, self.batch = D**-0.5, batch
        per = (context - WINDOW) // W
        self.num_bytes = batch * per * self.layout.page_bytes
        generator = torch.Generator("cuda").manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

        def numbers(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device="cuda")

        self.q = random(batch, Hq, D)
        sealed = torch.zeros(
            DISTINCT_PAGES, self.layout.page_bytes, dtype=torch.uint8, device="cuda"
        )
        k, v = random(DISTINCT_PAGES * W, H, D), random(DISTINCT_PAGES * W, H, D)
        ids = torch.arange(DISTINCT_PAGES, dtype=torch.int32, device="cuda")[None]
        blocks = -(-context // BLOCK)
        live = SINKS // BLOCK + -(-(context - per * W) // BLOCK)
        self.local = random(batch * live + 1, H, BLOCK, 2 * D)
        nowhere = torch.full((len(k),), -1, dtype=torch.int64, device="cuda")
        sealing = self.layer(sealed)
        seal.seal(sealing, prompt(numbers(0, len(k)), ids, nowhere, sink_tokens=0), k, v)
        order = torch.randint(0, DISTINCT_PAGES, (batch * per,), generator=generator, device="cuda")
        self.pages = sealed[order]
        shuffled = torch.randperm(batch * per, generator=generator, device="cuda")
        self.page_table = shuffled.view(batch, per).int()
        table = torch.zeros(batch, blocks, dtype=torch.int32, device="cuda")
        # Block 0 is vLLM's null block.
        used = 1 + torch.randperm(batch * live, generator=generator, device="cuda").view(
            batch, live
        )
        table[:, : SINKS // BLOCK] = used[:, : SINKS // BLOCK]
        table[:, per * W // BLOCK :] = used[:, SINKS // BLOCK :]
        self.table = table
        self.num_pages = numbers(*[per] * batch)
        self.gaps = numbers(*[0] * batch)
        self.seq_lens = numbers(*[context] * batch)
        self.slots = BLOCK * used[:, -1].long()  # one cell a request
        self.starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        of_pages = parts_of_pages(batch, H, per, sms)
        of_raw = decode_raw.parts_of_raw(batch, H, sms)
        columns = (batch, Hq, self.tables.num_columns)
        self.parts = Parts(
            torch.empty(batch, Hq, of_pages + of_raw, D, device="cuda"),
            torch.empty(batch, Hq, of_pages + of_raw, device="cuda"),
            torch.empty(columns, dtype=torch.float16, device="cuda"),
            of_pages,
            of_raw,
        )
        self.out = torch.empty_like(self.q)
        self.k, self.v = k[:batch], v[:batch]
        self.bound = self.layer(self.pages)
        self.requests = Step(
            self.seq_lens, self.starts, self.page_table, self.table, self.slots, self.num_pages,
            self.gaps, window_of(SINKS),
        )  # fmt: skip
        self.idle = self.requests._replace(seq_lens=self.seq_lens + 1)

    def layer(self, pages: Tensor) -> Layer:
        return Layer(self.tables, Launches(), self.scale, pages, self.local)

    def pages_only(self) -> None:
        query_columns(self.bound, self.q, self.parts)
        decode.attend_pages(self.bound, self.requests, self.q, self.parts)

    def step(self) -> None:
        self.pages_only()
        decode_raw.attend_raw(self.bound, self.requests, self.q, self.parts)
        join_parts(self.tables, self.parts, self.out)

    def seal_nothing(self) -> None:
        seal.seal(self.bound, self.idle, self.k, self.v)


def flash_attention(
    timer: Timer, Hq: int, H: int, D: int, batch: int, context: int, fp8: bool
) -> float | None:
    """FlashAttention 3 as vLLM ships it, over paged raw KV; None where it is not installed."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    blocks = batch * context // BLOCK
    kv = torch.empty(2, blocks, BLOCK, H, D, dtype=torch.bfloat16, device="cuda")
    kv = kv.normal_().to(dtype)
    table = torch.randperm(blocks, device="cuda").view(batch, -1).int()
    q = torch.randn(batch, Hq, D, device="cuda", dtype=torch.bfloat16).to(dtype)
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    options: dict[str, Any] = {}
    if fp8:
        one = torch.ones(batch, H, device="cuda")
        options = {"q_descale": one, "k_descale": one, "v_descale": one}

    def step() -> None:
        flash_attn_varlen_func(
            q, kv[0], kv[1], max_seqlen_q=1, cu_seqlens_q=starts, max_seqlen_k=context,
            seqused_k=lens, block_table=table, causal=True, softmax_scale=D**-0.5, fa_version=3,
            **options,
        )  # fmt: skip

    try:
        return timer(step)[0]
    except RuntimeError as error:
        print(f"FlashAttention 3 does not run: {error}")
        return None


def per_launch(timer: Timer, step: Callable[[], Any], count: int = 20) -> float:
    """Microseconds that one more launch in a graph costs."""
    many = timer(lambda: [step() for _ in range(count)])[0]
    return (many - timer(step)[0]) / (count - 1)


def sealing(timer: Timer) -> dict[str, Any]:
    """Sealing a prompt of 32,768 tokens, copying its keys and values, and steps that complete no page."""
    case, tokens = Decode(*SHAPES["llama-3.1-8b"], 1, 4096), 32768
    k, v = (torch.randn(tokens, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    raw = torch.stack([k, v])
    copy = torch.empty_like(raw)
    n = tokens // W
    pages = torch.empty(n, case.layout.page_bytes, dtype=torch.uint8, device="cuda")
    ids = torch.arange(n, dtype=torch.int32, device="cuda")[None]
    starts = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    nowhere = torch.full((tokens,), -1, dtype=torch.int64, device="cuda")
    layer, step = case.layer(pages), prompt(starts, ids, nowhere, SINKS)
    idle = {
        f"idle_us_batch_{batch}": per_launch(timer, Decode(32, 8, 128, batch, 4096).seal_nothing)
        for batch in (1, 8, 32, 128)
    }
    return {
        "seal_us": timer(lambda: seal.seal(layer, step, k, v))[0],
        "copy_us": timer(lambda: copy.copy_(raw))[0],
        **idle,
    }


def first_call() -> float:
    """Seconds to compile and run every kernel of a decode step, Triton's cache being new."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    case = Decode(*SHAPES["llama-3.1-8b"], 2, 4096)
    case.step()
    case.seal_nothing()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(
    timer: Timer, bandwidth: float, name: str, recipe: str, batch: int, context: int
) -> dict[str, Any]:
    shape = SHAPES[name]
    case = Decode(*shape, batch, context, recipe)
    ours, spread = timer(case.step)
    pages = timer(case.pages_only)[0]
    floor = case.num_bytes / bandwidth
    row = {
        "shape": name,
        "batch": batch,
        "context": context,
        "recipe": recipe,
        "ratio": case.layout.ratio,
        "ours_us": ours,
        "spread_us": spread,
        "pages_us": pages,
        "floor_us": floor,
        "gb_per_s": case.num_bytes / pages / 1e3,
        "share_of_bandwidth": floor / pages,
    }
    del case
    others = recipe == "balanced"
    row["fa3_bf16_us"] = flash_attention(timer, *shape, batch, context, False) if others else None
    row["fa3_fp8_us"] = flash_attention(timer, *shape, batch, context, True) if others else None
    row["turboquant_us"] = turboquant(timer, *shape, batch, context) if others else None
    torch.cuda.empty_cache()
    return row | {"gpu": torch.cuda.get_device_name(), "commit": commit()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the four cases of the goals")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        compiled = first_call()
    timer = Timer()
    bandwidth = copy_bandwidth(timer)
    print(f"{torch.cuda.get_device_name()}: copies {bandwidth / 1e6:.2f} TB/s")
    sealed = sealing(timer) | {"first_call_s": compiled, "copy_tb_per_s": bandwidth / 1e6}
    sealed |= {"gpu": torch.cuda.get_device_name(), "commit": commit(), **versions()}
    print(sealed, flush=True)
    save(args.out / "seal.json", sealed)
    goals = [("llama-3.1-8b", recipe, *case) for recipe in RECIPES for case in sorted(GOALS)]
    cases = [(n, "balanced", b, c) for n in SHAPES for c in CONTEXTS for b in BATCHES]
    rows = []
    for name, recipe, batch, context in goals if args.quick else dict.fromkeys([*goals, *cases]):
        _, H, D = SHAPES[name]
        if 4 * batch * context * H * D > MAX_BYTES:
            continue
        row = measure(timer, bandwidth, name, recipe, batch, context)
        rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        save(args.out / "decode.json", rows)
    print(machine("cuda"), versions())


if __name__ == "__main__":
    main()
