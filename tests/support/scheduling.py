"""vLLM's real scheduler and block managers over the two caches, with a worker that keeps stamps."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from fourier_vllm.engine.cache.specs import FourierLocalSpec, FourierPageSpec
from fourier_vllm.window import Window
from tests.support.stamps import Tokens, Worker, expect, next_token

LLAMA = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=512,
    max_position_embeddings=131072,
    rope_theta=10000.0,
    dtype="bfloat16",
)


# What managers keep by request.
BY_REQUEST = ("req_to_blocks", "num_cached_block", "_freed_until", "_prefill_tokens", "_publishers")


def engine_config(folder: Path, model: dict[str, Any] | None = None, **options: Any) -> Any:
    """VllmConfig for a model that is nothing but its config.json."""
    (folder / "config.json").write_text(json.dumps(model or LLAMA))
    settings = dict(model=str(folder), load_format="dummy", skip_tokenizer_init=True)
    return EngineArgs(**{**settings, **options}).create_engine_config()


def page_spec(window: Window, page_bytes: int = 1024) -> FourierPageSpec:
    return FourierPageSpec(
        block_size=window.page_size,
        block_stride_alignment=256,
        num_kv_heads=2,
        head_size=32,
        dtype=torch.bfloat16,
        num_head_slots=1,
        tokens_per_state=window.page_size,
        state_content_bytes=page_bytes,
    )


def local_spec(window: Window, num_groups: int = 1) -> FourierLocalSpec:
    return FourierLocalSpec(
        block_size=window.block_size,
        num_kv_heads=2,
        head_size=32,
        dtype=torch.bfloat16,
        sliding_window=window.local_window + window.page_size,
        page_size=window.page_size,
        local_window=window.local_window,
        num_pinned_blocks=window.num_pinned_blocks,
        num_groups=num_groups,
        exact_prefill=window.exact_prefill,
    )


def cache_config(window: Window, num_blocks: int) -> KVCacheConfig:
    """One group of pages and one of raw blocks."""
    return KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[
            KVCacheGroupSpec(["layer"], page_spec(window)),
            KVCacheGroupSpec(["layer.fourier_local"], local_spec(window)),
        ],
    )


def retained_tokens(spec: Any) -> int:
    """What vLLM 0.33's V2 runner takes from a group's spec, see its `initialize_kv_cache`."""
    return spec.num_retained_tokens if isinstance(spec, SlidingWindowSpec) else 0


class Engine:
    """Scheduler and worker; `in_flight` steps are scheduled before the first's tokens arrive.

    A freed block that nothing can hit is poisoned at once, and every block when it is handed out.
    """

    def __init__(
        self,
        config: Any,
        window: Window,
        num_blocks: int,
        *,
        prefix_caching: bool = True,
        in_flight: int = 1,
        runner: str = "v1",
        gather: str = "v0.32",
        seed: int = 0,
    ) -> None:
        init_none_hash(sha256)
        self.config, self.window, self.in_flight = config, window, in_flight
        config.cache_config.num_gpu_blocks = num_blocks
        config.cache_config.enable_prefix_caching = prefix_caching
        config.scheduler_config.async_scheduling = in_flight > 1
        caches = cache_config(window, num_blocks)
        block_size, hash_block_size = resolve_kv_cache_block_sizes(caches, config)
        self.scheduler = (AsyncScheduler if in_flight > 1 else Scheduler)(
            vllm_config=config,
            kv_cache_config=caches,
            structured_output_manager=StructuredOutputManager(config),
            block_size=block_size,
            hash_block_size=hash_block_size,
        )
        self.hasher = get_request_block_hasher(hash_block_size, sha256) if prefix_caching else None
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.worker = Worker(window, num_blocks, config.model_config.max_model_len, runner, seed)
        if gather == "v0.33":
            groups = caches.kv_cache_groups
            page, local = (retained_tokens(group.kv_cache_spec) for group in groups)
            self.worker.nulled_below = (page, local)
        self.queue: deque[Any] = deque()
        self.num_added = self.num_preemptions = self.num_hits = self.max_running = 0
        self.finished: list[str] = []
        self.taken: list[Any] = []
        get_new_blocks, free_blocks = self.pool.get_new_blocks, self.pool.free_blocks

        def get_poisoned(n: int) -> list[Any]:
            blocks = get_new_blocks(n)
            self.worker.poison([b.block_id for b in blocks])
            return blocks

        def free_poisoned(blocks: Iterable[Any]) -> None:
            blocks = list(blocks)
            free_blocks(blocks)
            free = (b for b in blocks if b.ref_cnt == 0 and b.block_hash is None)
            self.worker.poison([b.block_id for b in free if not b.is_null])

        self.pool.get_new_blocks, self.pool.free_blocks = get_poisoned, free_poisoned

    @property
    def managers(self) -> tuple[Any, ...]:
        return self.scheduler.kv_cache_manager.coordinator.single_type_managers

    def add(
        self, name: str, prompt: list[int], max_tokens: int, priority: int = 0, **sampling: Any
    ) -> Request:
        request = Request(
            request_id=name,
            prompt_token_ids=prompt,
            sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling),
            pooling_params=None,
            arrival_time=float(self.num_added),
            priority=priority,
            block_hasher=self.hasher,
        )
        self.num_added += 1
        self.scheduler.add_request(request)
        return request

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    def preempt(self) -> None:
        """Preempt the newest running request, as if the pool had run out."""
        if self.scheduler.running:
            self.scheduler._preempt_request(self.scheduler.running.pop(), 0.0)

    def squeeze(self, num_free: int) -> None:
        """Take all free blocks but `num_free`, until `release`."""
        self.taken += self.pool.get_new_blocks(max(self.pool.get_num_free_blocks() - num_free, 0))

    def release(self) -> None:
        self.pool.free_blocks(self.taken)
        self.taken = []

    def step(self) -> None:
        """Schedule and run one step; take the tokens of the one that leaves the pipeline."""
        scheduler = self.scheduler
        before = {name: r.num_preemptions for name, r in scheduler.requests.items()}
        output = scheduler.schedule()
        self.num_preemptions += sum(
            scheduler.requests[name].num_preemptions - n for name, n in before.items()
        )
        self.num_hits += sum(new.num_computed_tokens > 0 for new in output.scheduled_new_reqs)
        self.max_running = max(self.max_running, len(scheduler.running))
        self.worker.execute(output, scheduler.requests)
        names = list(output.num_scheduled_tokens)
        sampled = []
        for name in names:
            row, request = self.worker.rows[name], scheduler.requests[name]
            end = row.num_computed + output.num_scheduled_tokens[name]
            last = int(row.tokens.stamps(end)[-1])
            sampled.append([] if request.is_prefill_chunk else [next_token(last)])
        result = ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: i for i, name in enumerate(names)},
            sampled_token_ids=sampled,
        )
        self.queue.append((output, result))
        while len(self.queue) >= self.in_flight or (self.queue and not names):
            self._take()

    def _take(self) -> None:
        output, result = self.queue.popleft()
        known = dict(self.scheduler.requests)
        self.scheduler.update_from_output(output, result)
        for name in known.keys() - self.scheduler.requests.keys():
            self.finished.append(name)
            right = Tokens(known[name].prompt_token_ids)
            ids = known[name].all_token_ids
            right.stamps(len(ids))
            expect(right.ids[: len(ids)] == list(ids), "the scheduler's tokens went astray")

    def run(self, max_steps: int = 5000) -> None:
        """Until every request has finished; then every block must be back."""
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished_requests():
                break
            self.step()
        else:
            raise AssertionError(f"requests still unfinished after {max_steps} steps")
        while self.queue:
            self._take()
        self.check_empty()

    def check_empty(self) -> None:
        free = self.pool.get_num_free_blocks()
        assert free == self.pool.num_gpu_blocks - 1, f"{free} blocks free"
        for manager in self.managers:
            for name in BY_REQUEST:
                assert not getattr(manager, name, None), f"{type(manager).__name__}.{name} remains"
