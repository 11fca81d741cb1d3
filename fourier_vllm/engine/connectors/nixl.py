"""vLLM's NIXL connector over sealed pages: the decoding engine pulls what a prefix-cache hit takes.

That is every whole page in front of the last prompt token, and the pinned blocks. What follows, less than a
page and one token, is computed again by the engine that decodes.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import (
    NixlBaseConnector,
    NixlPullConnector,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import (
    NixlPullConnectorScheduler,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

from fourier_vllm.calibration.calibrate import tool_version
from fourier_vllm.engine.binding import compressed_here
from fourier_vllm.engine.cache.specs import FourierLocalSpec, FourierPageSpec


class FourierNixlConnector(NixlPullConnector):
    """For both engines; `kv_role` says which one it is."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        made = (vllm_config, self.engine_id, kv_cache_config)
        is_scheduler = role == KVConnectorRole.SCHEDULER
        self.connector_scheduler = _Scheduler(*made) if is_scheduler else None
        self.connector_worker = None if is_scheduler else _Worker(*made)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> None:
        """The backend's own, in which a block is a row of all layers."""
        return


class _Scheduler(NixlPullConnectorScheduler):
    def __init__(self, vllm_config: Any, engine_id: str, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self._specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        (self._page_size,) = {x.block_size for x in self._specs if isinstance(x, FourierPageSpec)}

    def _get_remote_prefill_token_count(self, num_prompt_tokens: int) -> int:
        """Tokens that a hit takes from pages."""
        return (num_prompt_tokens - 1) // self._page_size * self._page_size

    def get_exchange_clipped_blocks(self, block_ids: Any, clip_ssm: bool = True) -> Any:
        """All of them: `request_finished` and the block managers have chosen."""
        return block_ids

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        tokens = self._get_remote_prefill_token_count(request.num_prompt_tokens)
        return super().request_finished(
            request,
            tuple(self._of_hit(*x, tokens) for x in zip(self._specs, block_ids, strict=True)),
        )

    def _of_hit(self, spec: Any, blocks: list[int], tokens: int) -> list[int]:
        last = tokens // spec.block_size
        if isinstance(spec, FourierLocalSpec):
            last = min(last, spec.num_pinned_blocks)
        return list(blocks[:last])


class _Worker(NixlPullConnectorWorker):
    backend_name: str

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Register whole rows: caches of several page sizes begin at the same address."""
        # vLLM's handshake compares the name, and refuses where it differs.
        self.backend_name = f"{self.backend_name} {self._format()}"
        storage = next(iter(kv_caches.values())).untyped_storage()
        addresses = {cache.untyped_storage().data_ptr() for cache in kv_caches.values()}
        assert addresses == {storage.data_ptr()}, "the backend's layout has one allocation"
        rows = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        row_bytes = len(rows) // self.num_blocks
        rows = rows[: row_bytes * self.num_blocks].view(self.num_blocks, row_bytes)
        super().register_kv_caches(dict.fromkeys(kv_caches, rows))

    def _format(self) -> str:
        """Digest of what the bytes of a row mean on this rank."""
        layers = compressed_here(self.vllm_config.compilation_config.static_forward_context)
        found = {name: layer.impl.bound for name, layer in sorted(layers.items())}
        rows = [
            (name, x.layout, x.window.sink_tokens, x.window.block_size) for name, x in found.items()
        ]
        text = repr((tool_version(), self.tp_rank, self.transfer_tp_size, rows))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _apply_prefix_caching(
        self, decode_block_ids: Any, prefill_block_ids: Any, **kwargs: Any
    ) -> Any:
        """A group that needs nothing gets nothing; vLLM would take all of it."""
        asked = zip(decode_block_ids, prefill_block_ids, strict=True)
        wanted = [theirs if ours else [] for ours, theirs in asked]
        return super()._apply_prefix_caching(decode_block_ids, wanted, **kwargs)
