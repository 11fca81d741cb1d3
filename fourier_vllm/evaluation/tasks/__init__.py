"""The tasks, by name. A new one is a small file here and a line in `TASKS`."""

from __future__ import annotations

from fourier_vllm.evaluation.tasks.agreement import agreement
from fourier_vllm.evaluation.tasks.base import Task
from fourier_vllm.evaluation.tasks.multikey import multikey
from fourier_vllm.evaluation.tasks.multivalue import multivalue
from fourier_vllm.evaluation.tasks.needle import needle
from fourier_vllm.evaluation.tasks.nll import nll
from fourier_vllm.evaluation.tasks.vartrack import vartrack

TASKS: dict[str, Task] = {
    "nll": nll,
    "needle": needle,
    "multikey": multikey,
    "multivalue": multivalue,
    "vartrack": vartrack,
    "agreement": agreement,
}
