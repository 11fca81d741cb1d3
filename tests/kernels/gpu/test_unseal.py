"""Keys and values laid out by Triton, against the reference codec and plain indexing."""

from __future__ import annotations

import pytest
import torch

from fourier_vllm.kernels.gpu import tables
from fourier_vllm.kernels.gpu.launch import Launches
from fourier_vllm.kernels.gpu.step import Layer, Step
from fourier_vllm.kernels.gpu.unseal import unseal
from fourier_vllm.window import Window
from tests.support.numerics import DTYPES, assert_close
from tests.support.pages import FRAGMENT_RECIPES, RECIPES, codec_of, tokens
from tests.support.triton_kernels import DEVICE, needs_triton

pytestmark = needs_triton

H, BLOCK = 2, 16


def check(
    recipe: str,
    fragments: bool,
    contexts: tuple[int, ...] = (128,),
    query_lens: tuple[int, ...] = (9,),
    num_pages: tuple[int, ...] = (2,),
    first_row: int = 0,
    begin: int = 0,
    sinks: int = 5,
    D: int = 32,
    W: int = 64,
    dtype: str = "float16",
) -> None:
    """Requests whose first `num_pages` are sealed, the rest in the local cache and in flight."""
    codec = codec_of(recipe, H, D, W, dtype, fragments)
    rng = torch.Generator().manual_seed(2)
    B, size = len(contexts), codec.layout.page_bytes
    lens = [c + n for c, n in zip(contexts, query_lens, strict=True)]
    per = -(-max(lens) // W)
    k, v = (x.reshape(B, per * W, H, D).to(DTYPES[dtype]) for x in tokens(B * per, codec, 3))
    ids = torch.randperm(B * per + 2, generator=rng)[: B * per].view(B, per).int()
    pages = torch.full((B * per + 2, size + 256), 0xFF, dtype=torch.uint8)
    table = torch.randperm(B * per * W // BLOCK, generator=rng).view(B, -1).int() + 1
    local = torch.full((int(table.max()) + 1, H, BLOCK, 2 * D), torch.nan, dtype=DTYPES[dtype])
    expected, flying = [], []
    for b, (context, n, count) in enumerate(zip(contexts, lens, num_pages, strict=True)):
        both = torch.stack([k[b, :n], v[b, :n]]).float()
        if count:
            raw = (x[b, : count * W].unflatten(0, (count, W)) for x in (k, v))
            sealed = codec.seal(*raw)
            pages[ids[b, :count].long(), :size] = sealed
            both[:, : count * W] = torch.stack([x.flatten(0, 1) for x in codec.reconstruct(sealed)])
        for t in [*range(sinks), *range(count * W, context)]:
            local[table[b, t // BLOCK], :, t % BLOCK] = torch.cat([k[b, t], v[b, t]], -1)
        both[:, :sinks] = torch.stack([k[b, :sinks], v[b, :sinks]]).float()
        expected.append(both[:, begin:])
        flying.append(torch.stack([k[b, context:n], v[b, context:n]]))
    starts = [0]
    for x in expected[first_row:]:
        starts.append(starts[-1] + x.shape[1])
    out = torch.full((2, starts[-1] + 1, H, D), torch.nan, dtype=DTYPES[dtype], device=DEVICE)

    def numbers(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    step = Step(
        numbers(lens), numbers([0, *torch.tensor(query_lens).cumsum(0).tolist()]), ids.to(DEVICE),
        table.to(DEVICE), numbers([]), numbers(list(num_pages)), numbers([0] * B),
        Window(W, 2 * W, sinks, BLOCK, exact_prefill=False),
    )  # fmt: skip
    layer = Layer(
        tables.Tables.build(codec.layout, DEVICE),
        Launches(),
        1.0,
        pages.to(DEVICE),
        local.to(DEVICE),
    )
    k_new, v_new = torch.cat(flying, 1).to(DEVICE)
    unseal(
        layer, step, k_new, v_new, first_row, begin, max(lens) - begin, numbers(starts), out[0], out[1]
    )  # fmt: skip
    # What the model dtype rounds away.
    bound = 4e-3 if dtype == "bfloat16" else 1e-3
    for name, want, got in zip("kv", torch.cat(expected[first_row:], 1), out, strict=True):
        assert_close(f"{name} of {recipe}", want, got[:-1], bound)
        assert got[-1].isnan().all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe(recipe: str) -> None:
    check(recipe, False)


@pytest.mark.parametrize("recipe", FRAGMENT_RECIPES)
def test_every_recipe_in_fragment_order(recipe: str) -> None:
    check(recipe, True)


@pytest.mark.parametrize(
    ("D", "W"), [(16, 64), (64, 128), (80, 64), (96, 128), (192, 64), (256, 64)]
)
@pytest.mark.parametrize("fragments", [False, True])
def test_sizes(D: int, W: int, fragments: bool) -> None:
    check("coded-3", fragments, (W,), (W + 1,), (1,), D=D, W=W, dtype="bfloat16")


@pytest.mark.parametrize("fragments", [False, True])
def test_a_ragged_batch(fragments: bool) -> None:
    check("coded-2", fragments, (0, 200, 64, 150), (70, 1, 64, 30), (0, 3, 0, 1), first_row=1)


def test_a_segment() -> None:
    check("coded-2", True, (200,), (50,), (3,), begin=128)
