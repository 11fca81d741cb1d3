"""Runs vLLM in this process and talks to it in token ids."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.toys import VOCAB_SIZE

# Small pages and windows, so that short sequences go through every edge.
LOSSLESS = dict(target="lossless", page_size=32, local_window=48, sink_tokens=16)
KERNELS_LOSSLESS = LOSSLESS | dict(page_size=64, local_window=80)  # the kernels' smallest pages


def settings(fourier: dict[str, Any] | None) -> dict[str, Any]:
    """Options of an engine of a toy model."""
    common: dict[str, Any] = dict(
        dtype="float32",
        enforce_eager=True,
        max_model_len=1024,
        max_num_batched_tokens=64,
        max_num_seqs=4,
        kv_cache_memory_bytes=64 << 20,
        skip_tokenizer_init=True,
        seed=0,
    )
    if fourier is None:
        return common
    return common | dict(attention_backend="fourier", additional_config={"fourier": fourier})


@contextmanager
def engine(model: Any, fourier: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """An LLM in this process; `fourier` selects the backend, None is stock vLLM."""
    import torch
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = None
    try:
        llm = LLM(str(model), **settings(fourier) | options)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
        torch._dynamo.reset()


def generate_on_replicas(
    model: Any, fourier: dict[str, Any], ids: list[list[int]], max_tokens: int, **options: Any
) -> list[list[int]]:
    """Greedy tokens from two engines that share the requests (data parallel)."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    params = SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=False, ignore_eos=True)

    async def run() -> list[list[int]]:
        args = AsyncEngineArgs(
            model=str(model), data_parallel_size=2, **settings(fourier) | options
        )
        llm = AsyncLLM.from_engine_args(args)

        async def one(i: int, prompt: list[int]) -> list[int]:
            request = llm.generate({"prompt_token_ids": prompt}, params, request_id=str(i))
            async for output in request:
                last = output
            return list(last.outputs[0].token_ids)

        try:
            return await asyncio.gather(*(one(i, x) for i, x in enumerate(ids)))
        finally:
            llm.shutdown()

    return asyncio.run(run())


def prompts(seed: int = 0) -> list[list[int]]:
    """Short, page-sized and long prompts, and three that share a prefix of 200 tokens."""
    random_ = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [random_.randrange(3, VOCAB_SIZE) for _ in range(n)]

    shared = ids(200)
    return [ids(n) for n in (5, 37, 130, 300)] + [shared + ids(n) for n in (10, 70, 1)]


def generate(llm: Any, ids: list[list[int]], max_tokens: int = 100, **sampling: Any) -> list[Any]:
    """Greedy tokens with log-probabilities; one vLLM output a prompt, in order."""
    from vllm import SamplingParams

    params = SamplingParams(
        **dict(temperature=0, max_tokens=max_tokens, logprobs=1, detokenize=False, ignore_eos=True)
        | sampling
    )
    return llm.generate([{"prompt_token_ids": x} for x in ids], params, use_tqdm=False)


def tokens(outputs: list[Any]) -> list[list[int]]:
    """Token ids of every completion of every output."""
    return [list(c.token_ids) for o in outputs for c in o.outputs]


def assert_same_but_for_ties(ours: list[Any], stock: list[Any], tie: float) -> None:
    """Tokens are equal while log-probabilities are equal within `tie`, which nearly all of them are.

    For models that compute in 16 bits: a step whose two best tokens are nearer than the rounding falls
    either way, and ends the comparison of its completion.
    """
    compared = total = 0
    for a, b in zip(ours, stock, strict=True):
        a, b = a.outputs[0], b.outputs[0]
        total += len(b.token_ids)
        steps = zip(a.token_ids, b.token_ids, a.logprobs, b.logprobs, strict=True)
        for token, expected, found, wanted in steps:
            # A token that is not among stock's best ones is as far behind as can be told.
            lead = wanted[expected].logprob - (wanted[token].logprob if token in wanted else -1e9)
            assert lead < tie, f"a token is chosen whose log-probability is {lead:.2g} behind"
            gap = abs(found[token].logprob - wanted[token].logprob)
            assert gap < tie, f"log-probabilities differ by {gap:.2g}"
            if token != expected:
                break
            compared += 1
    assert compared > total // 3, f"only {compared} of {total} tokens were compared"


def digest(ids: list[list[int]]) -> str:
    """A short name for tokens, for the record of what was compared."""
    return hashlib.sha256(repr(ids).encode()).hexdigest()[:12]


def conversation(llm: Any, max_tokens: int = 64) -> list[list[int]]:
    """Prompts, the same again (prefix hits), then a second turn of the first four."""
    ids = prompts()
    first = generate(llm, ids, max_tokens)
    again = generate(llm, ids, max_tokens)
    turns = [p + a + [7, 8, 9] for p, a in zip(ids[:4], tokens(first)[:4], strict=True)]
    return tokens(first) + tokens(again) + tokens(generate(llm, turns, max_tokens))


def sleep_and_reload(llm: Any) -> None:
    """Give all memory back, then take it again and read the weights from their files."""
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])


def blocks_held_after_abort(llm: Any) -> int:
    """Give up all prompts in the middle of their answers."""
    from vllm import SamplingParams

    core, params = llm.llm_engine, SamplingParams(max_tokens=50, detokenize=False)
    for i, ids in enumerate(prompts()):
        core.add_request(str(i), {"prompt_token_ids": ids}, params)
    for _ in range(6):
        core.step()
    core.abort_request([str(i) for i in range(len(prompts()))])
    while core.has_unfinished_requests():
        core.step()
    return blocks_held(llm)


def block_pool(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool


def blocks_held(llm: Any) -> int:
    """Blocks that are not free, without the null block."""
    pool = block_pool(llm)
    return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()


@contextmanager
def count_preemptions() -> Iterator[list[int]]:
    """A list whose only element counts preemptions."""
    from vllm.v1.core.sched.scheduler import Scheduler

    original, count = Scheduler._preempt_request, [0]

    def preempt(self: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return original(self, *args, **kwargs)

    Scheduler._preempt_request = preempt
    try:
        yield count
    finally:
        Scheduler._preempt_request = original


@contextmanager
def poison_free_blocks(llm: Any) -> Iterator[None]:
    """Fill both caches with NaN bytes, and every block again when it is handed out."""
    import torch
    from vllm.v1.core.block_pool import BlockPool

    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    layers = runner.compilation_config.static_forward_context.values()
    caches = [layer.kv_cache for layer in layers]
    for cache in caches:
        cache.view(torch.uint8).fill_(0xFF)
    original, pool = BlockPool.get_new_blocks, block_pool(llm)

    def get_new_blocks(self: Any, num_blocks: int) -> list[Any]:
        blocks = original(self, num_blocks)
        if self is pool:  # a tier below has one of its own
            for cache in caches:
                cache.view(torch.uint8)[[b.block_id for b in blocks]] = 0xFF
        return blocks

    BlockPool.get_new_blocks = get_new_blocks
    try:
        yield
    finally:
        BlockPool.get_new_blocks = original


@contextmanager
def gather_like_v33() -> Iterator[None]:
    """Null entries of block tables as vLLM 0.33's V2 runner does, by what the specs say."""
    import torch

    from fourier_vllm.engine.metadata import FourierMetadataBuilder
    from tests.support.scheduling import retained_tokens

    original = FourierMetadataBuilder.build

    def build(self: Any, common_prefix_len: int, common: Any, fast_build: bool = False) -> Any:
        spec, table = self.kv_cache_spec, common.block_table_tensor
        if reach := retained_tokens(spec):
            context = common.seq_lens - common.query_start_loc.diff()
            num_null = (context - reach).clamp_min(0) // spec.block_size
            index = torch.arange(table.shape[1], device=table.device)
            table = table.masked_fill(index < num_null[:, None], 0)
            common = dataclasses.replace(common, block_table_tensor=table)
        return original(self, common_prefix_len, common, fast_build)

    FourierMetadataBuilder.build = build
    try:
        yield
    finally:
        FourierMetadataBuilder.build = original
