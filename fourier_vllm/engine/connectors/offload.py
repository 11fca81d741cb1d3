"""vLLM's `SimpleCPUOffloadConnector` over sealed pages: CPU memory, or a file on disk."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.simple_cpu_offload_connector import (
    SimpleCPUOffloadConnector,
)

from fourier_vllm.engine.cache.managers import lookup_behind


class FourierOffloadConnector(SimpleCPUOffloadConnector):
    """Hits that go on behind those of the GPU's own prefix cache.

    vLLM asks the tier for what follows a local hit as if that were the beginning of a request. The pinned
    blocks are then the local hit's, and the tier has to give pages only.
    """

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        with lookup_behind(num_computed_tokens):
            found: tuple[int | None, bool] = super().get_num_new_matched_tokens(
                request, num_computed_tokens
            )
        return found
