"""The kernel that joins parts, interpreted or compiled, against a plain softmax over parts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.support.numerics import assert_close
from tests.support.triton_kernels import DEVICE, needs_triton

pytestmark = needs_triton

NUM_SMS = 4


@pytest.mark.parametrize(("T", "Hq"), [(1, 2), (2, 5), (7, 9)])  # few rows, some, many
@pytest.mark.parametrize(("rotated", "raw"), [(1, 0), (1, 1), (5, 2), (67, 11)])
@pytest.mark.parametrize("D", [16, 80])
def test_parts_are_joined(T: int, Hq: int, rotated: int, raw: int, D: int) -> None:
    from fourier_vllm.kernels.gpu.join import join_parts
    from fourier_vllm.kernels.gpu.step import Parts

    rng = torch.Generator().manual_seed(T + rotated + D)
    BD = 1 << (D - 1).bit_length()
    rotation = torch.zeros(BD, BD)
    rotation[:D, :D] = torch.linalg.qr(torch.randn(D, D, generator=rng))[0]
    n = rotated + raw
    acc = torch.randn(T, Hq, n, D, generator=rng)
    lse = 30 * torch.randn(T, Hq, n, generator=rng)
    empty = torch.rand(T, Hq, n, generator=rng) < 0.3
    empty[0, 0] = True
    acc[empty], lse[empty] = torch.nan, -torch.inf

    weights = torch.exp2(lse.double())
    total = weights.sum(-1, keepdim=True)
    joined = weights[..., None] * acc.double().nan_to_num()
    expected = joined[:, :, :rotated].sum(2) @ rotation[:D, :D].double().T
    expected = (expected + joined[:, :, rotated:].sum(2)) / total.clamp_min(1e-300)

    out = torch.full((T, Hq, D), torch.nan, device=DEVICE)
    tables = SimpleNamespace(rotation=rotation.to(DEVICE), num_sms=NUM_SMS)
    join_parts(tables, Parts(acc.to(DEVICE), lse.to(DEVICE), acc, rotated, raw), out)
    assert_close("out", expected, out, 1e-5)
