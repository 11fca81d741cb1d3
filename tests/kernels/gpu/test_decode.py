"""Triton attention over sealed pages and raw tokens against float64 softmax over rebuilt pages."""

from __future__ import annotations

import pytest
import torch

from fourier_vllm.kernels.gpu import decode, decode_raw, step, tables
from fourier_vllm.kernels.gpu.join import join_parts
from fourier_vllm.kernels.gpu.launch import Launches
from fourier_vllm.kernels.gpu.query_columns import query_columns
from fourier_vllm.window import Window
from tests.support.numerics import DTYPES, assert_close
from tests.support.pages import FRAGMENT_RECIPES, RECIPES, codec_of, tokens
from tests.support.triton_kernels import DEVICE, needs_triton

pytestmark = needs_triton

H, BLOCK, SPARE = 2, 16, 3
TOLERANCE = {"float32": 1e-3, "float16": 2e-3, "bfloat16": 5e-3}


class Case:
    """Requests with tokens of known K and V in both caches; whatever nobody reads is NaN or 0xFF."""

    def __init__(
        self,
        recipe: str = "balanced",
        seq_lens: tuple[int, ...] = (300,),
        query_lens: tuple[int, ...] = (1,),
        group: int = 3,
        sinks: int = 4,
        window: int = 32,
        gaps: tuple[int, ...] | None = None,
        D: int = 32,
        W: int = 64,
        dtype: str = "float16",
        seed: int = 0,
        fragments: bool = False,
    ):
        self.codec = codec_of(recipe, H, D, W, dtype, fragments)
        self.dtype, self.sinks, self.window = DTYPES[dtype], sinks, window
        self.seq_lens, self.query_lens = seq_lens, query_lens
        self.gaps = gaps or (0,) * len(seq_lens)
        rng = torch.Generator().manual_seed(seed)
        B, W = len(seq_lens), self.codec.layout.page_size
        self.num_pages = [
            max(gap, max(0, n - window) // W) for n, gap in zip(seq_lens, self.gaps, strict=True)
        ]
        total = sum(self.num_pages)
        width = self.codec.layout.page_bytes + 256
        cache = torch.full((total + SPARE, width), 0xFF, dtype=torch.uint8)
        ids = torch.randperm(len(cache), generator=rng)[:total]
        k, v = (x.to(self.dtype).float() for x in tokens(max(total, 1), self.codec, seed))
        cache[ids, : width - 256] = self.codec.seal(k, v)[:total]
        k_page, v_page = self.codec.reconstruct(cache[ids, : width - 256])
        self.page_table = torch.full(
            (B, max(self.num_pages) + 1), len(cache) + 7, dtype=torch.int32
        )
        blocks = -(-max(seq_lens) // BLOCK)
        local = torch.full((B * blocks + SPARE, H, BLOCK, 2 * D), torch.nan)
        table = torch.randperm(len(local), generator=rng)[: B * blocks].view(B, blocks).int()
        self.k, self.v = [], []  # [n, H, D] raw and rebuilt of each request
        done = 0
        for b, n in enumerate(seq_lens):
            pages = slice(done, done + self.num_pages[b])
            done = pages.stop
            self.page_table[b, : self.num_pages[b]] = ids[pages].int()
            raw = torch.randn(2, n, H, D, generator=rng).to(self.dtype).float()
            first = self.bound(b, 0) * W
            for t in (t for t in range(n) if t < sinks or t >= first):
                local[table[b, t // BLOCK], :, t % BLOCK] = torch.cat([*raw[:, t]], -1)
            self.k.append((raw[0], k_page[pages].flatten(0, 1)))
            self.v.append((raw[1], v_page[pages].flatten(0, 1)))
        T = sum(query_lens)
        self.q = torch.randn(T, H * group, D, generator=rng).to(self.dtype)
        self.cache, self.local, self.table = cache, local.to(self.dtype), table

    def bound(self, b: int, t: int) -> int:
        """Pages that query token `t` of request `b` reads."""
        n = self.seq_lens[b] - self.query_lens[b] + 1 + t
        W = self.codec.layout.page_size
        return min(self.num_pages[b], max(self.gaps[b], max(0, n - self.window) // W))

    def starts(self) -> torch.Tensor:
        return torch.tensor([0, *torch.tensor(self.query_lens).cumsum(0)], dtype=torch.int32)

    def expected(self, pages_only: bool = False) -> torch.Tensor:
        """Float64 softmax, `[T, Hq, D]`."""
        out, row = torch.zeros(self.q.shape, dtype=torch.float64), 0
        W, D = self.codec.layout.page_size, self.q.shape[-1]
        for b, count in enumerate(self.query_lens):
            for t in range(count):
                n = self.seq_lens[b] - count + 1 + t
                end = W * (self.num_pages[b] if pages_only else self.bound(b, t))
                parts = []
                for raw, rebuilt in (self.k[b], self.v[b]):
                    middle = rebuilt[self.sinks : max(end, self.sinks)]
                    ends = [] if pages_only else [raw[: min(self.sinks, end)], raw[end:n]]
                    parts.append(torch.cat([*ends, middle]).double().transpose(0, 1))  # [H, n, D]
                q = self.q[row].double().view(H, -1, D)
                if parts[0].shape[1]:
                    p = (q @ parts[0].mT * D**-0.5).softmax(-1)
                    out[row] = (p @ parts[1]).flatten(0, 1)
                row += 1
        return out

    def layout_tables(self) -> tables.Tables:
        return tables.Tables.build(self.codec.layout, DEVICE)

    def ready(self, of_pages: int, of_raw: int, gaps: list[int] | None = None):
        """What the host functions take: the layer, the step, queries and parts."""
        T, Hq, D = self.q.shape
        at = self.layout_tables()
        q, cache, local, page_table, table, starts = (
            x.to(DEVICE)
            for x in (self.q, self.cache, self.local, self.page_table, self.table, self.starts())
        )
        num_pages, gap_pages, seq_lens = (
            torch.tensor(x, dtype=torch.int32, device=DEVICE)
            for x in (self.num_pages, gaps or self.gaps, self.seq_lens)
        )
        W = self.codec.layout.page_size
        window = Window(W, self.window, self.sinks, BLOCK, exact_prefill=False)
        requests = step.Step(
            seq_lens, starts, page_table, table, starts[:0], num_pages, gap_pages, window,
            max(self.query_lens),
        )  # fmt: skip
        parts = step.Parts(
            torch.full((T, Hq, of_pages + of_raw, D), torch.nan, device=DEVICE),
            torch.full((T, Hq, of_pages + of_raw), torch.nan, device=DEVICE),
            torch.empty(T, Hq, at.num_columns, dtype=torch.float16, device=DEVICE),
            of_pages,
            of_raw,
        )
        return step.Layer(at, Launches(), D**-0.5, cache, local), requests, q, parts

    def decode(self) -> torch.Tensor:
        layer, requests, q, parts = self.ready(3, 2)
        query_columns(layer, q, parts)
        decode.attend_pages(layer, requests, q, parts)
        decode_raw.attend_raw(layer, requests, q, parts)
        out = torch.empty_like(q)
        join_parts(layer.tables, parts, out)
        return out.cpu()


def check(recipe: str, dtype: str = "float16", **options) -> None:
    case = Case(recipe, dtype=dtype, **options)
    assert_close(recipe, case.expected(), case.decode(), TOLERANCE[dtype])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe(recipe: str) -> None:
    check(recipe, seq_lens=(230,), dtype="bfloat16")


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_dtype(dtype: str) -> None:
    check("mixed", dtype, seq_lens=(200,))


@pytest.mark.parametrize("D", [64, 80, 192, 256])
def test_head_sizes(D: int) -> None:
    check("balanced", seq_lens=(180,), D=D, group=1)


@pytest.mark.parametrize("group", [1, 8, 17])
def test_groups(group: int) -> None:
    check("balanced", seq_lens=(180,), group=group)


def test_page_and_window_edges_in_a_ragged_batch() -> None:
    lens = (1, 31, 95, 96, 97, 159, 160, 161)
    check("balanced", seq_lens=lens, query_lens=(1,) * len(lens))


def test_several_query_tokens_read_what_their_lengths_say() -> None:
    check("quality", seq_lens=(98, 40, 163), query_lens=(5, 0, 8), group=2)


def test_tokens_whose_raw_copies_are_gone_are_read_from_pages() -> None:
    check("balanced", seq_lens=(200, 150), query_lens=(1, 2), gaps=(3, 2))


@pytest.mark.parametrize("sinks", [0, 17])
def test_pinned_tokens(sinks: int) -> None:
    check("balanced", seq_lens=(170, 20), query_lens=(1, 1), sinks=sinks)


def test_the_same_twice() -> None:
    case = Case("balanced", seq_lens=(300, 120), query_lens=(1, 1))
    assert torch.equal(case.decode(), case.decode())


def test_a_chunk_over_the_pages_before_it() -> None:
    case = Case("balanced", seq_lens=(260, 40, 200), query_lens=(40, 3, 7), dtype="bfloat16")
    # All query tokens of a request read all of its pages.
    layer, requests, q, parts = case.ready(1, 0, gaps=case.num_pages)
    query_columns(layer, q, parts)
    decode.attend_pages(layer, requests, q, parts)
    out, lse = torch.empty_like(q), parts.lse[..., 0]
    join_parts(layer.tables, parts, out)
    assert_close("out", case.expected(pages_only=True), out.cpu(), TOLERANCE["bfloat16"])
    assert torch.equal(
        lse.isinf()[:, 0].cpu(), torch.tensor([False] * 40 + [True] * 3 + [False] * 7)
    )


@pytest.mark.parametrize("recipe", FRAGMENT_RECIPES)
def test_every_recipe_in_fragment_order(recipe: str) -> None:
    check(recipe, seq_lens=(230,), dtype="bfloat16", fragments=True)


@pytest.mark.parametrize(
    ("D", "W"), [(16, 64), (64, 128), (80, 64), (96, 128), (192, 64), (256, 64)]
)
def test_sizes_in_fragment_order(D: int, W: int) -> None:
    check("coded-3", seq_lens=(2 * W + 50,), D=D, W=W, group=1, fragments=True)


@pytest.mark.parametrize("group", [1, 8, 17])
def test_groups_in_fragment_order(group: int) -> None:
    check("coded-2", seq_lens=(180,), group=group, fragments=True)


def test_edges_gaps_and_pinned_tokens_in_fragment_order() -> None:
    lens = (1, 31, 95, 96, 97, 159, 160, 161)
    check("coded-2", seq_lens=lens, query_lens=(1,) * len(lens), fragments=True)
    check("coded-4", seq_lens=(200, 150), query_lens=(1, 2), gaps=(3, 2), sinks=17, fragments=True)


def test_several_query_tokens_in_fragment_order() -> None:
    check("coded-3", seq_lens=(98, 40, 163), query_lens=(5, 0, 8), group=2, fragments=True)


def test_small_pages_are_refused() -> None:
    with pytest.raises(ValueError, match="page_size must be at least 64"):
        tables.Tables.build(codec_of("balanced", W=32).layout, DEVICE)
