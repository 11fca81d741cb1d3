"""Tables of the local cache, as the V2 runner of the installed vLLM gathers them for a step."""

from __future__ import annotations

import inspect
import os
import sys
from typing import Any

import pytest
import torch

from tests.support.scheduling import local_spec, page_spec, retained_tokens
from tests.support.traffic import WINDOWED

NUM_TOKENS = 1000
needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


@pytest.fixture
def block_tables(monkeypatch):
    """vLLM's class, with Triton's interpreter in place of vLLM's placeholder."""
    import triton
    import triton.language as tl
    import vllm.triton_utils as utils

    monkeypatch.setattr(utils, "triton", triton)
    monkeypatch.setattr(utils, "tl", tl)
    monkeypatch.setattr("vllm.utils.platform_utils.is_uva_available", lambda: False)
    for name in ("buffer_utils", "block_table"):
        monkeypatch.delitem(sys.modules, f"vllm.v1.worker.gpu.{name}", raising=False)
    module = pytest.importorskip("vllm.v1.worker.gpu.block_table")
    if "sliding_window_reach" not in inspect.signature(module.BlockTables).parameters:
        pytest.skip("this vLLM gathers tables as they are")
    return module.BlockTables


def gathered(block_tables: Any, reach: list[int]) -> list[torch.Tensor]:
    """Rows of pages and of raw blocks, of a request with `NUM_TOKENS` tokens before the step."""
    sizes = [WINDOWED.page_size, WINDOWED.block_size]
    counts = [-(-NUM_TOKENS // size) for size in sizes]
    tables = block_tables(
        block_sizes=sizes,
        max_num_reqs=2,
        max_num_batched_tokens=64,
        max_num_blocks_per_group=counts,
        device=torch.device("cpu"),
        sliding_window_reach=reach,
    )
    ids = tuple(list(range(100, 100 + count)) for count in counts)
    tables.append_block_ids(1, ids, overwrite=True)
    tables.apply_staged_writes()
    rows = tables.gather_block_tables(
        torch.tensor([1], dtype=torch.int32),
        1,
        num_computed_tokens=torch.tensor([0, NUM_TOKENS], dtype=torch.int32),
    )
    return [row[0] for row in rows]


@needs_interpreter
def test_every_entry_is_kept(block_tables):
    reach = [retained_tokens(spec) for spec in (page_spec(WINDOWED), local_spec(WINDOWED))]
    for row in gathered(block_tables, reach):
        assert row.tolist() == list(range(100, 100 + len(row)))


@needs_interpreter
def test_a_window_would_lose_the_pinned_blocks(block_tables):
    """Negative control: what the runner does with `SlidingWindowSpec`'s own number."""
    reach = WINDOWED.local_window + WINDOWED.page_size
    pages, local = gathered(block_tables, [0, reach])
    num_null = (NUM_TOKENS - reach) // WINDOWED.block_size
    assert (pages > 0).all()
    assert (local[:num_null] == 0).all()
    assert (local[num_null:] > 0).all()


def test_what_the_runner_takes_from_a_spec():
    """`retained_tokens` of these tests says the same."""
    runner = pytest.importorskip("vllm.v1.worker.gpu.model_runner").GPUModelRunner
    text = " ".join(inspect.getsource(runner.initialize_kv_cache).split())
    if "sliding_window_reach" not in text:
        pytest.skip("this vLLM gathers tables as they are")
    rule = "layer_spec.num_retained_tokens if isinstance(layer_spec, SlidingWindowSpec) else 0"
    assert rule in text
