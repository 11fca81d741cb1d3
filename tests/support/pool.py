"""The managers of both caches over one pool of blocks, without a scheduler."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import replace

from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from fourier_vllm.window import Window
from tests.support.scheduling import local_spec, page_spec
from tests.support.stamps import LOCAL_GROUP
from tests.support.traffic import EXACT, WINDOWED

WIDE = Window(page_size=64, local_window=96, sink_tokens=16, block_size=8, exact_prefill=False)


NO_SINKS = replace(WINDOWED, sink_tokens=0, block_size=8)


MODES = {
    "windowed": WINDOWED,
    "exact": EXACT,
    "wide": WIDE,
    "wide-exact": replace(WIDE, exact_prefill=True),
    "no-sinks": NO_SINKS,
}


@st.composite
def windows(draw: st.DrawFn) -> Window:
    W = draw(st.sampled_from((32, 64)))
    return Window(
        page_size=W,
        local_window=draw(st.sampled_from((16, 32, 48, 80))),
        sink_tokens=draw(st.sampled_from((0, 1, 16, 24, 32))),
        block_size=draw(st.sampled_from((8, 16, 32))),
        exact_prefill=draw(st.booleans()),
    )


class Pool:
    """vLLM's KVCacheManager without a scheduler: requests advance as they are told to.

    Up to `batches` steps of a request are in flight; `held` and `most` count its raw blocks.
    """

    def __init__(
        self,
        config,
        window: Window,
        num_blocks: int,
        batches: int = 1,
        local_groups: int = 1,
        caches: KVCacheConfig | None = None,
    ) -> None:
        init_none_hash(sha256)
        self.window, self.batches = window, batches
        locals_ = [
            KVCacheGroupSpec([f"layer{i}.fourier_local"], local_spec(window, local_groups))
            for i in range(local_groups)
        ]
        self.caches = caches or KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], page_spec(window)), *locals_],
        )
        scheduler_block_size, hash_block_size = resolve_kv_cache_block_sizes(self.caches, config)
        self.manager = KVCacheManager(
            self.caches,
            config.model_config.max_model_len,
            scheduler_block_size,
            hash_block_size,
            max_in_flight_tokens=batches * config.scheduler_config.max_num_batched_tokens,
        )
        self.hasher = get_request_block_hasher(hash_block_size, sha256)
        self.pool = self.manager.block_pool
        self.local = self.manager.coordinator.single_type_managers[LOCAL_GROUP]
        self.in_flight: dict[str, deque[int]] = {}
        self.most = 0

    def request(self, name: str, prompt: list[int]) -> Request:
        self.in_flight[name] = deque()
        return Request(name, prompt, SamplingParams(), None, block_hasher=self.hasher)

    def held(self, request: Request, group: int = LOCAL_GROUP) -> int:
        return sum(not b.is_null for b in self.manager.get_blocks(request.request_id).blocks[group])

    def advance(self, request: Request, n: int) -> bool:
        """Schedule `n` tokens; the oldest step in flight is processed first."""
        steps = self.in_flight[request.request_id]
        while len(steps) >= self.batches:
            request.num_in_flight_tokens -= steps.popleft()
        first = request.num_computed_tokens == 0
        hit, blocks = 0, None
        if first:
            blocks, hit, _ = self.manager.get_computed_blocks(request)
        new = self.manager.allocate_slots(
            request, n, hit, blocks, full_sequence_must_fit=first, has_scheduled_reqs=False
        )
        if new is None:
            return False
        request.num_computed_tokens += hit + n
        request.num_in_flight_tokens += n
        steps.append(n)
        self.most = max(self.most, self.held(request))
        return True

    def prefill(self, request: Request, chunks) -> bool:
        """Compute the whole prompt; `chunks()` is the next chunk's size."""
        while request.num_computed_tokens < request.num_tokens:
            n = min(chunks(), request.num_tokens - request.num_computed_tokens)
            if not self.advance(request, n):
                return False
        return True

    def decode(self, request: Request, until: int) -> bool:
        while request.num_computed_tokens < until:
            request.append_output_token_ids(7)
            if not self.advance(request, 1):
                return False
        return True

    def free(self, request: Request) -> None:
        self.manager.free(request)


def prompt(n: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(500) for _ in range(n)]
