"""Many query rows, a chunk of a prompt, over the sealed pages before it."""

from __future__ import annotations

import torch
from torch import Tensor

from fourier_vllm.kernels.gpu.decode import attend_pages
from fourier_vllm.kernels.gpu.join import reduce
from fourier_vllm.kernels.gpu.query_columns import query_columns
from fourier_vllm.kernels.gpu.step import Batch
from fourier_vllm.kernels.gpu.tables import Tables


def prefill_pages(tables: Tables, batch: Batch, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over pages alone, to be merged with attention over raw tokens and the chunk itself.

    Parameters are those of `attend_pages`.

    Returns
    -------
    tuple of Tensor
        Outputs [T, Hq, D] of the dtype of `q` and natural log-sum-exps [T, Hq], float32: 0 and -inf
        where a request has no pages.
    """
    q = batch.q
    T, Hq, D = q.shape
    acc = torch.empty(T, Hq, 1, D, dtype=torch.float32, device=q.device)
    lse = torch.empty(T, Hq, 1, dtype=torch.float32, device=q.device)
    columns = torch.empty(T, Hq, tables.num_columns, dtype=torch.float16, device=q.device)
    query_columns(tables, q, batch.sm_scale, columns)
    attend_pages(tables, batch, pages, acc, lse, 1, columns)
    out, out_lse = torch.empty_like(q), torch.empty(T, Hq, dtype=torch.float32, device=q.device)
    reduce(tables, acc, lse, 1, out, out_lse)
    return out, out_lse
