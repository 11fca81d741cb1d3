"""One engine in a process of its own: the workloads it runs, and a row for each."""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

import torch

from benchmarks.serve import settings
from benchmarks.workloads.drive import drive, summary
from benchmarks.workloads.traffic import LARGE, SMALL, Request, Traffic, arrivals, workloads

STEADY = 0.7  # of the limit
MAX_MODEL_LEN = 32768
COUNTERS = {
    "preempted": "vllm:num_preemptions",
    "hits": "vllm:prefix_cache_hits",
    "queries": "vllm:prefix_cache_queries",
    "from_tier": "vllm:external_prefix_cache_hits",
}


def options(args: argparse.Namespace, engine: str, folder: str) -> dict[str, Any]:
    """Options of `LLM`."""
    found = settings(args, engine, MAX_MODEL_LEN, folder)
    found |= {"enable_prefix_caching": True, "max_num_seqs": 256}
    if args.offload_gib:
        found["kv_transfer_config"] = {
            "kv_connector": "SimpleCPUOffloadConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": int(args.offload_gib * (1 << 30))},
        }
    if not torch.cuda.is_available():
        found |= {"max_model_len": 4096, "kv_cache_memory_bytes": 1 << 28, "enforce_eager": True}
        if engine == "stock":
            del found["attention_backend"]
    return found


def counters(llm: Any) -> dict[str, float]:
    values = {m.name: m.value for m in llm.get_metrics() if m.name in COUNTERS.values()}
    return {short: values.get(name, 0) for short, name in COUNTERS.items()}


def measured(llm: Any, traffic: Traffic) -> dict[str, Any]:
    """A row of one workload, from an empty prefix cache."""
    llm.reset_prefix_cache()
    before = counters(llm)
    row = summary(*drive(llm, traffic))
    found = {name: value - before[name] for name, value in counters(llm).items()}
    row["hit_rate"] = round(found["hits"] / max(1, found["queries"]), 3)
    return row | {name: int(found[name]) for name in ("preempted", "from_tier")}


def run(args: argparse.Namespace, engine: str, rate: float | None, rows: Any) -> None:
    """All workloads of one engine; a row is sent as soon as it is measured."""
    from fourier_vllm.evaluation.engine_session import running

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    sizes = SMALL if args.small else LARGE
    sizes = sizes._replace(agents=args.agents or sizes.agents)
    with (
        tempfile.TemporaryDirectory() as folder,
        running(options(args, engine, folder)) as llm,
    ):
        kv_tokens = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
        about = {"engine": engine, "kv_tokens": kv_tokens}
        # What is compiled or allocated on first use.
        drive(llm, Traffic([Request(f"warm-{i}", list(range(1000, 1600)), 8) for i in range(4)]))
        for name, make in workloads(sizes, args.workloads):
            row = measured(llm, make(args.seed))
            if name == "limit":
                rate = rate or STEADY * row["req_s"]
            rows.put(about | {"workload": name} | row)
        if "steady" in args.workloads and rate is not None:
            row = measured(llm, arrivals(sizes, args.seed, rate))
            rows.put(about | {"workload": "steady", "rate": round(rate, 3)} | row)
