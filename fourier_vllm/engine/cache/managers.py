"""Block managers of the two caches, in vLLM's own block manager.

Pages are full attention in every respect. The local cache keeps the pinned first blocks as long as the
request runs, and a window of recent ones; a chunk of a prompt gets blocks only for the tokens that outlive
it, because inside the chunk attention and sealing read K and V in flight.

The prefix cache holds pages and pinned blocks. The window is scratch: one raw block takes a block id that
would hold a page, so window blocks in the prefix cache would evict several times their worth of pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)

# Tokens that a lookup's request has in front of the hashes that it is asked for.
_BEHIND: ContextVar[int] = ContextVar("behind", default=0)


@contextmanager
def lookup_behind(num_computed_tokens: int) -> Iterator[None]:
    """Lookups in here are for what follows so many tokens, whose blocks the request has."""
    token = _BEHIND.set(num_computed_tokens)
    try:
        yield
    finally:
        _BEHIND.reset(token)


class _ComputedOnly(SingleTypeKVCacheManager):
    """Takes back blocks that a request published and never computes.

    vLLM publishes blocks when it schedules their tokens. A priority victim may be preempted by the step that
    scheduled it, before `num_computed_tokens` counts these tokens; nobody computes them then.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._publishers: dict[str, Any] = {}  # requests by their ids

    def cache_blocks(self, request: Any, *args: Any, **kwargs: Any) -> None:
        self._publishers[request.request_id] = request
        super().cache_blocks(request, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        blocks = super().pop_blocks_for_free(request_id)
        request = self._publishers.pop(request_id, None)
        if request is not None:
            uncomputed = blocks[request.num_computed_tokens // self.block_size :]
            self.block_pool.evict_blocks({b.block_id for b in uncomputed if b.block_hash})
        return blocks


class FourierPageManager(_ComputedOnly, FullAttentionManager):
    """One block a page; a page is hit only when it is whole."""

    supports_fine_grained_hash_lookup = False

    def _cache_partial_tail_block(self, *args: Any, **kwargs: Any) -> None:
        return


class FourierLocalManager(_ComputedOnly, SlidingWindowManager):
    """Pinned first blocks plus a sliding window of raw blocks.

    A prefix-cache hit takes the pages and the pinned blocks. Between the pinned blocks and the end of the
    hit the table holds the null block, which tells the worker to read those tokens from their pages.
    """

    def __init__(self, kv_cache_spec: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._pinned = kv_cache_spec.num_pinned_blocks
        self._freed_until: dict[str, int] = {}
        # Exact prefill: tokens to be computed before the window starts to move, by request.
        self._prefill_tokens: dict[str, int] = {}

    def _first_kept(self, num_tokens: int) -> int:
        """First unpinned block index that a query after `num_tokens` tokens may read."""
        return max((num_tokens - self.sliding_window + 1) // self.block_size, self._pinned)

    def _is_retaining(self, request_id: str, num_tokens: int) -> bool:
        return num_tokens <= self._prefill_tokens.get(request_id, -1)

    def _num_real(self, request_id: str, first: int, num_tokens: int) -> int:
        """Real blocks among the new table entries `first..` that reach `num_tokens`."""
        last = cdiv(num_tokens, self.block_size)
        if self._is_retaining(request_id, num_tokens):
            return max(last - first, 0)
        pinned = max(min(self._pinned, last) - first, 0)
        return pinned + max(last - max(first, self._first_kept(num_tokens)), 0)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        first = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks)
        evictable = self._get_num_evictable_blocks(new_computed_blocks)
        if not apply_admission_cap:
            return self._num_real(request_id, first, num_tokens) + evictable
        # The admission gate sees every request before its first step, with all tokens it will prefill.
        if self.kv_cache_spec.exact_prefill:
            self._prefill_tokens[request_id] = num_tokens
        whole = max(cdiv(num_tokens, self.block_size) - first, 0)
        return min(whole, self.max_admission_blocks_per_request or whole) + evictable

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[Any]:
        blocks = self.req_to_blocks[request_id]
        first, last = len(blocks), cdiv(num_tokens, self.block_size)
        if last <= first:
            return []
        real = iter(self.block_pool.get_new_blocks(self._num_real(request_id, first, num_tokens)))
        keep = 0 if self._is_retaining(request_id, num_tokens) else self._first_kept(num_tokens)
        new = [
            next(real) if i < self._pinned or i >= keep else self._null_block
            for i in range(first, last)
        ]
        blocks.extend(new)
        return new

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        """Blocks for a hit in another tier: pinned ones, and null blocks as in a hit of this cache."""
        if num_external_computed_tokens <= 0:
            return
        blocks = self.req_to_blocks[request_id]
        first = len(blocks)
        last = cdiv(num_local_computed_tokens + num_external_computed_tokens, self.block_size)
        pinned = self.block_pool.get_new_blocks(max(0, min(self._pinned, last) - first))
        blocks.extend(pinned)
        blocks.extend([self._null_block] * (last - len(blocks)))
        if self._record_new_block_ids and record_for_zeroing:
            self.new_block_ids.extend(block.block_id for block in pinned)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Publish the pinned blocks alone; an event for others would hold their tokens and no hash."""
        super().cache_blocks(
            request, min(num_tokens, self._pinned * self.block_size), *args, **kwargs
        )

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        if processed_computed_tokens < self._prefill_tokens.get(request_id, 0):
            return
        blocks = self.req_to_blocks.get(request_id)
        if not blocks:
            return
        start = self._freed_until.get(request_id, self._pinned)
        stop = max(min(self._first_kept(processed_computed_tokens), len(blocks)), start)
        freed = [block for block in blocks[start:stop] if not block.is_null]
        blocks[start:stop] = [self._null_block] * (stop - start)
        self._freed_until[request_id] = stop
        self.block_pool.free_blocks(freed)

    def pop_blocks_for_free(self, request_id: str) -> list[Any]:
        self._freed_until.pop(request_id, None)
        self._prefill_tokens.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Hits keep their own nulls, see `find_longest_cache_hit`; the window moves elsewhere."""
        return 0

    @classmethod
    def reachable_block_mask(
        cls, start_block: int, end_block: int, *, kv_cache_spec: Any, **kwargs: Any
    ) -> list[bool]:
        """Which of the full blocks `start_block..end_block` enter the prefix cache: the pinned ones."""
        return [i < kv_cache_spec.num_pinned_blocks for i in range(start_block, end_block)]

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[Any], ...], int]:
        size = kv_cache_spec.block_size
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, size)
        hit = max_length // alignment_tokens * alignment_tokens
        groups: tuple[list[Any], ...] = tuple(
            [block_pool.null_block] * (hit // size) for _ in kv_cache_group_ids
        )
        pinned = max(0, kv_cache_spec.num_pinned_blocks - _BEHIND.get() // size)
        for i in range(min(pinned, hit // size)):
            cached = block_pool.get_cached_block(hashes[i], kv_cache_group_ids)
            if not cached:
                return tuple([] for _ in kv_cache_group_ids), 0
            for blocks, block in zip(groups, cached, strict=True):
                blocks[i] = block
        return groups, hit
