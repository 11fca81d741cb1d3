"""Attention metadata: one plan a step, however many builders ask."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from fourier_vllm.engine.cpu import path as cpu_path
from fourier_vllm.engine.metadata import FourierMetadata, FourierMetadataBuilder
from fourier_vllm.window import Window

WINDOW = Window(32, 48, 16, 16, exact_prefill=False)


def common(tokens: int = 7) -> SimpleNamespace:
    return SimpleNamespace(
        num_reqs=1,
        query_start_loc=torch.tensor([0, tokens, tokens]),
        query_start_loc_cpu=torch.tensor([0, tokens, tokens]),
        seq_lens_cpu_upper_bound=torch.tensor([tokens, 0]),
        seq_lens=torch.tensor([tokens, 0]),
        is_prefilling=None,
        block_table_tensor=torch.ones(2, 4, dtype=torch.int32),
        slot_mapping=torch.arange(16, 16 + tokens),
    )


def build(step: SimpleNamespace) -> FourierMetadata:
    return FourierMetadataBuilder.build(object.__new__(FourierMetadataBuilder), 0, step)


def test_layers_with_pages_of_different_sizes_share_one_plan(monkeypatch):
    """They have builders of their own, and raw blocks in one group."""
    made = []

    def run(metadata: FourierMetadata) -> None:
        path.run(None, None, None, None, torch.zeros(1, 1, 1, 256), None, metadata, local)

    monkeypatch.setattr(cpu_path, "run_step", lambda codec, plan, *rest: made.append(plan))
    path = object.__new__(cpu_path.CpuPath)
    path.codec, path.window, path.scale = None, WINDOW, 1.0
    pages, local = common(), build(common())
    run(build(pages))
    run(build(pages))
    assert made[0] is made[1] is local.plan
    local = build(common())
    run(build(pages))
    assert made[2] is not made[0]


def test_a_step_has_metadata_of_its_own():
    assert build(common()) is not build(common())


def test_padding_rows_are_left_out():
    made = build(common())
    assert len(made.seq_lens) == len(made.block_table) == len(made.is_prefilling) == 1
    assert made.query_start_loc.tolist() == [0, 7]
