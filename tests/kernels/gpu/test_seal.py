"""Storing and sealing by Triton against plain indexing and the reference codec."""

from __future__ import annotations

import pytest
import torch

from fourier_vllm.kernels.gpu import seal, tables
from fourier_vllm.kernels.gpu.launch import Launches
from fourier_vllm.kernels.gpu.step import Layer, Step
from fourier_vllm.window import Window
from tests.support.numerics import DTYPES, assert_close
from tests.support.pages import FRAGMENT_RECIPES, RECIPES, codec_of, tokens
from tests.support.triton_kernels import DEVICE, needs_triton

pytestmark = needs_triton

H, BLOCK = 2, 16


def check(
    recipe: str,
    contexts: tuple[int, ...] = (0,),
    query_lens: tuple[int, ...] = (64,),
    sinks: int = 0,
    D: int = 32,
    W: int = 64,
    dtype: str = "float16",
    fragments: bool = False,
) -> None:
    """Requests with tokens in the local cache and in flight; what is not written stays as it was."""
    codec = codec_of(recipe, H, D, W, dtype, fragments)
    rng = torch.Generator().manual_seed(1)
    B, size = len(contexts), codec.layout.page_bytes
    lens = [c + n for c, n in zip(contexts, query_lens, strict=True)]
    per = -(-max(lens) // W)
    k, v = (x.reshape(B, per * W, H, D).to(DTYPES[dtype]) for x in tokens(B * per, codec, 2))
    table = torch.randperm(B * per * W // BLOCK + 2, generator=rng)[: B * per * W // BLOCK]
    table = table.view(B, -1).int()
    local = torch.full((int(table.max()) + 1, H, BLOCK, 2 * D), torch.nan, dtype=DTYPES[dtype])
    flying = []
    for b, (context, n) in enumerate(zip(contexts, lens, strict=True)):
        for t in range(max(0, context - 2 * W), context):
            local[table[b, t // BLOCK], :, t % BLOCK] = torch.cat([k[b, t], v[b, t]], -1)
        flying.append(torch.stack([k[b, context:n], v[b, context:n]]))
    k_new, v_new = torch.cat(flying, 1)
    ids = torch.randperm(B * per + 3, generator=rng)[: B * per].view(B, per).int()
    pages = torch.full((B * per + 3, size + 256), 0xAB, dtype=torch.uint8)
    got = pages.clone().to(DEVICE)
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0)], dtype=torch.int32)
    # Every third token has no cell.
    cells = [
        table[b, t // BLOCK] * BLOCK + t % BLOCK
        for b, (context, n) in enumerate(zip(contexts, lens, strict=True))
        for t in range(context, n)
    ]
    slots = torch.tensor([-1 if i % 3 == 0 else cell for i, cell in enumerate(cells)])
    stored, expected_local = local.to(DEVICE, copy=True), local.clone()
    for i, slot in enumerate(slots.tolist()):
        if slot >= BLOCK:
            expected_local[slot // BLOCK, :, slot % BLOCK] = torch.cat([k_new[i], v_new[i]], -1)
    window = Window(W, 2 * W, sinks, BLOCK, exact_prefill=False)
    none = torch.zeros(B, dtype=torch.int32, device=DEVICE)
    step = Step(
        torch.tensor(lens, dtype=torch.int32, device=DEVICE), starts.to(DEVICE), ids.to(DEVICE),
        table.to(DEVICE), slots.to(DEVICE), none, none, window,
    )  # fmt: skip
    layer = Layer(tables.Tables.build(codec.layout, DEVICE), Launches(), 1.0, got, stored)
    seal.seal(layer, step, k_new.to(DEVICE), v_new.to(DEVICE))
    assert torch.equal(stored.cpu().nan_to_num(9e3), expected_local.nan_to_num(9e3))
    got = got.cpu()
    sealed = torch.zeros(len(pages), dtype=torch.bool)
    for b, (context, n) in enumerate(zip(contexts, lens, strict=True)):
        for i in range(context // W, n // W):
            at = slice(i * W, (i + 1) * W)
            pinned = torch.tensor([min(max(sinks - i * W, 0), W)])
            expected = codec.seal(k[b : b + 1, at], v[b : b + 1, at], pinned)
            page = got[ids[b, i] : ids[b, i] + 1]
            sealed[ids[b, i]] = True
            for name, x, y, original in zip(
                "kv", codec.reconstruct(expected), codec.reconstruct(page[:, :size]), (k, v),
                strict=True,
            ):  # fmt: skip
                kept = slice(int(pinned), W)
                # Codes on an edge may fall to either side; the error to the original may not grow.
                assert_close(f"{name} of {recipe}", x[:, kept], y[:, kept], 4e-2)
                exact = original[b, at].float()[None, kept]
                lost, same = ((z[:, kept] - exact).square().sum() for z in (y, x))
                assert lost <= same * 1.01 + 1e-6
            assert (page[:, size:] == 0xAB).all()
    assert torch.equal(got[~sealed], pages[~sealed])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe(recipe: str) -> None:
    check(recipe)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes(dtype: str) -> None:
    check("mixed", dtype=dtype)


@pytest.mark.parametrize("D", [64, 80, 192, 256])
def test_head_sizes(D: int) -> None:
    check("balanced", D=D)


def test_a_ragged_batch_across_cache_and_flight() -> None:
    check(
        "balanced", contexts=(0, 63, 62, 127, 100, 5), query_lens=(63, 1, 1, 1, 130, 200), sinks=4
    )


def test_nothing_to_seal() -> None:
    check("balanced", contexts=(0, 10, 70), query_lens=(1, 1, 3))


def test_pinned_tokens_cost_no_precision() -> None:
    check("quality", sinks=17)


@pytest.mark.parametrize("recipe", FRAGMENT_RECIPES)
def test_every_recipe_in_fragment_order(recipe: str) -> None:
    check(recipe, fragments=True)


@pytest.mark.parametrize(
    ("D", "W"), [(16, 64), (64, 128), (80, 64), (96, 128), (192, 64), (256, 64)]
)
def test_sizes_in_fragment_order(D: int, W: int) -> None:
    check("coded-3", D=D, W=W, query_lens=(W,), dtype="bfloat16", fragments=True)


def test_a_ragged_batch_in_fragment_order() -> None:
    check("coded-2", contexts=(0, 63, 127, 5), query_lens=(63, 1, 1, 200), sinks=17, fragments=True)
