"""The engine's GPU path, its kernels interpreted or compiled, against the reference path, step by step."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fourier_vllm.engine.cpu import path as reference_path
from fourier_vllm.engine.metadata import FourierMetadata
from fourier_vllm.window import Window
from tests.support.decode_oracle import attend_decodes
from tests.support.memory import peak_bytes
from tests.support.numerics import assert_close
from tests.support.pages import codec_of
from tests.support.triton_kernels import DEVICE, needs_triton

pytestmark = needs_triton

H, G, D, W, BLOCK, LENGTH = 2, 2, 32, 64, 16, 320
WINDOWED = Window(
    page_size=W, local_window=80, sink_tokens=20, block_size=BLOCK, exact_prefill=False
)
EXACT = replace(WINDOWED, exact_prefill=True)


class Steps:
    """Requests that run through both paths; every position has a block of its own."""

    def __init__(self, recipe: str, window: Window, num_requests: int, fragments: bool):
        from vllm.v1.worker.workspace import init_workspace_manager, reset_workspace_manager

        from fourier_vllm.engine.gpu.path import GpuPath
        from fourier_vllm.engine.gpu.prompt_attention import TorchAttention

        reset_workspace_manager()
        init_workspace_manager(torch.device(DEVICE))
        codec = codec_of(recipe, H, D, W, "float32", fragments)
        self.codec, self.window = (
            reference_path.PageCodec(codec.layout, torch.float32, DEVICE),
            window,
        )
        self.path = GpuPath(
            codec.layout, window, TorchAttention(D**-0.5), H * G, D**-0.5, torch.float32,
            torch.device(DEVICE), LENGTH, num_requests, LENGTH,
        )  # fmt: skip
        rng = torch.Generator().manual_seed(0)
        B = num_requests
        ids = torch.randperm(B * LENGTH // BLOCK, generator=rng).view(B, -1).int() + 1
        self.local_table = ids.to(DEVICE)
        pages = torch.randperm(B * LENGTH // W, generator=rng).view(B, -1).int() + 1
        self.page_table = pages.to(DEVICE)
        size = codec.layout.page_bytes + 256
        blocks = B * LENGTH // W + 1
        self.pages = torch.full((blocks, 1, 1, size), 0xFF, dtype=torch.uint8, device=DEVICE)
        self.local = torch.full((int(ids.max()) + 1, H, BLOCK, 2 * D), torch.nan, device=DEVICE)
        self.lens = [0] * B
        self.rng = rng

    def metadata(self, table, slots, starts, lens, prefilling) -> FourierMetadata:
        int32 = dict(dtype=torch.int32)
        common = SimpleNamespace(
            num_reqs=len(lens),
            query_start_loc=torch.tensor(starts, **int32).to(DEVICE),
            seq_lens=torch.tensor(lens, **int32).to(DEVICE),
            is_prefilling=torch.tensor(prefilling),
            block_table_tensor=table,
            slot_mapping=slots,
            query_start_loc_cpu=torch.tensor(starts, **int32),
            seq_lens_cpu_upper_bound=torch.tensor(lens, **int32),
        )
        return FourierMetadata(common)

    def __call__(self, *work: tuple[int, int, bool]) -> None:
        """One step: requests, their query tokens, and whether they are prefilled; decodes first."""
        rows = torch.tensor([b for b, _, _ in work], device=DEVICE)
        starts, lens, cells = [0], [], []
        for b, n, _ in work:
            positions = torch.arange(self.lens[b], self.lens[b] + n)
            block = self.local_table[b].cpu()[positions // BLOCK].long()
            cells.append(torch.where(block > 0, block * BLOCK + positions % BLOCK, -1))
            self.lens[b] += n
            starts.append(starts[-1] + n)
            lens.append(self.lens[b])
        slots = torch.cat(cells).to(DEVICE)
        prefilling = [p for _, _, p in work]
        pages, local = (
            self.metadata(table[rows], slots, starts, lens, prefilling)
            for table in (self.page_table, self.local_table)
        )
        T = starts[-1]
        q = torch.randn(T, H * G, D, generator=self.rng).to(DEVICE)
        k, v = (torch.randn(T, H, D, generator=self.rng).to(DEVICE) for _ in range(2))
        out, expected = torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)
        before = self.local.clone()
        self.path.run(q, k, v, out, self.pages, self.local, pages, local)
        # Attention over the pages that the kernels sealed: sealing has tests of its own.
        plan = replace(reference_path.plan_of(self.window, pages, local), seal=None)
        sealed = self.pages[:, 0, 0]
        sinks = self.window.sink_tokens
        reference_path.run_step(self.codec, plan, q, k, v, expected, sealed, before, D**-0.5, sinks)
        assert torch.equal(before.nan_to_num(), self.local.nan_to_num())
        assert_close("out", expected.double(), out, 2e-3)


@pytest.fixture(autouse=True)
def on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    # The compiled CPU decode reads plain order in a CPU's memory only.
    monkeypatch.setattr(reference_path, "attend_decodes", attend_decodes)
    # vLLM's workspace grows on accelerators only.
    if DEVICE == "cpu":
        monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)


@pytest.mark.parametrize("window", [WINDOWED, EXACT])
@pytest.mark.parametrize(("recipe", "fragments"), [("coded-2", True), ("lossless", False)])
def test_prompts_in_chunks_beside_decodes(recipe: str, fragments: bool, window: Window) -> None:
    step = Steps(recipe, window, 3, fragments)
    step((0, 30, True), (1, 70, True))
    step((0, 1, False), (1, 100, True), (2, 5, True))
    step((0, 1, False), (2, 1, False), (1, 30, True))
    # The end of a prompt may be one token, and stand before requests that decode.
    step((2, 1, True), (0, 1, False), (1, 1, False))
    for _ in range(3):
        step((0, 1, False), (1, 1, False), (2, 1, False))


@pytest.mark.gpu
@pytest.mark.parametrize(("recipe", "fragments"), [("coded-2", True), ("lossless", False)])
def test_decode_steps_as_graphs(recipe: str, fragments: bool) -> None:
    step = Steps(recipe, WINDOWED, 3, fragments)
    step((0, 190, True), (1, 100, True), (2, 5, True))
    run = step.path.run

    def replay(*layer_step) -> None:
        run(*layer_step)  # compiles
        _, _, _, out, *_, local_metadata = layer_step
        out.fill_(torch.nan)
        local_metadata.plan = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(3):
                run(*layer_step)
        graph.replay()

    step.path.run = replay
    for _ in range(5):  # the first request completes a page
        step((0, 1, False), (1, 1, False), (2, 1, False))


def test_tokens_whose_raw_blocks_are_gone() -> None:
    step = Steps("coded-3", WINDOWED, 2, True)
    step((0, 200, True), (1, 150, True))
    step.local_table[0, 2:8] = 0
    step((1, 1, False), (0, 20, True))
    step((0, 1, False), (1, 1, False))


def test_padding_rows_write_nothing() -> None:
    step = Steps("coded-2", WINDOWED, 2, True)
    step((0, 63, True))
    before = step.pages.clone(), step.local.clone()
    slots = torch.tensor([-1, -1], device=DEVICE)
    pages, local = (
        step.metadata(torch.zeros_like(table), slots, [0, 1, 2], [0, 0], [False, False])
        for table in (step.page_table, step.local_table)
    )
    q = torch.randn(2, H * G, D, device=DEVICE)
    k, v = (torch.randn(2, H, D, device=DEVICE) for _ in range(2))
    out = torch.full_like(q, torch.nan)
    step.path.run(q, k, v, out, step.pages, step.local, pages, local)
    assert torch.equal(before[0], step.pages)
    assert torch.equal(before[1].nan_to_num(), step.local.nan_to_num())
    assert out.isfinite().all()


class SplitAttention:
    """Attention over any stretch of the keys, in plain PyTorch."""

    can_split = True

    def __call__(self, piece, q, k, v, out):
        lse = []
        parts = (
            x.split(n) for x, n in ((q, piece.query_lens), (k, piece.key_lens), (v, piece.key_lens))
        )
        for q_b, k_b, v_b, out_b in zip(*parts, out.split(piece.query_lens), strict=True):
            k_b, v_b = (x.repeat_interleave(G, 1) for x in (k_b, v_b))
            s = torch.einsum("qhd,khd->hqk", q_b, k_b) * D**-0.5
            if piece.is_last:
                n, m = s.shape[1:]
                s += torch.full((n, m), -torch.inf, device=s.device).triu(m - n + 1)
            lse.append(s.logsumexp(-1))
            out_b.copy_(torch.einsum("hqk,khd->qhd", s.softmax(-1), v_b))
        return torch.cat(lse, 1)


@pytest.mark.parametrize("window", [WINDOWED, EXACT])
def test_contexts_longer_than_the_scratch(window: Window) -> None:
    step = Steps("coded-2", window, 2, True)
    step.path.prefill.attention = SplitAttention()
    step.path.prefill.capacity = 2 * W
    step.path.prefill.can_overflow = True
    step((0, 63, True), (1, 64, True))
    step((0, 64, True), (1, 60, True))
    step((0, 60, True), (1, 50, True))
    step((1, 1, True), (0, 64, True))


@pytest.mark.parametrize(("recipe", "fragments"), [("coded-2", True), ("paper", False)])
def test_warming_up_runs_on_nothing(recipe: str, fragments: bool) -> None:
    Steps(recipe, WINDOWED, 2, fragments).path.prepare()


@pytest.mark.skipif(DEVICE != "cpu", reason="measures memory of a CPU")
@pytest.mark.parametrize("can_overflow", [False, True])
def test_profiling_holds_what_attention_takes(monkeypatch: pytest.MonkeyPatch, can_overflow: bool):
    """Beside the scratch, for the longest context and the largest chunk."""
    step = Steps("coded-2", WINDOWED, 2, True)
    prefill, asked = step.path.prefill, []

    def memory(q: torch.Tensor, k: torch.Tensor) -> int:
        asked.append((tuple(q.shape), tuple(k.shape)))
        return 50 << 20

    monkeypatch.setattr(prefill.attention, "memory", memory)
    prefill.capacity, prefill.can_overflow = 4096, can_overflow
    scratch = 4 * D * (2 * H * 4096 + (H * G * LENGTH if can_overflow else 0))
    assert scratch + (50 << 20) <= peak_bytes(prefill.prepare) < 1.1 * scratch + (50 << 20)
    assert asked == [((LENGTH, H * G, D), (4096, H, D))]


def test_requests_share_pieces_and_long_ones_are_cut() -> None:
    from fourier_vllm.engine.gpu.plan import cut

    pieces = cut(3, 10, [5, 0, 7, 9, 20, 4], [100, 0, 60, 90, 500, 30], 192, 64)
    found = [(p.first_row, p.queries, p.query_lens, p.key_lens, p.begin, p.is_last) for p in pieces]
    assert found == [
        (3, slice(10, 22), [5, 0, 7], [100, 0, 60], 0, True),
        (6, slice(22, 31), [9], [90], 0, True),
        (7, slice(31, 51), [20], [192], 0, False),
        (7, slice(31, 51), [20], [128], 192, False),
        (7, slice(31, 51), [20], [180], 320, True),
        (8, slice(51, 55), [4], [30], 0, True),
    ]
