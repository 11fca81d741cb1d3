"""What our connectors take for granted of vLLM's, in places that are not its public interface."""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_scheduler import (
    NixlBaseConnectorScheduler,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import NixlBaseConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import (
    NixlPullConnectorScheduler,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

from fourier_vllm.engine.connectors.choose import OURS
from tests.support.upstream import parameters, source


def test_vllm_has_the_connectors_that_ours_step_in_for():
    for name in OURS:
        assert name.startswith("Fourier") or name in KVConnectorFactory._registry, name


def test_the_scheduler_asks_how_many_tokens_to_pull():
    counted = NixlBaseConnectorScheduler._get_remote_prefill_token_count
    assert parameters(counted) == ["num_prompt_tokens"]
    text = source(NixlPullConnectorScheduler.get_num_new_matched_tokens)
    assert "self._get_remote_prefill_token_count(len(token_ids))" in text


def test_blocks_are_chosen_where_they_are_exchanged():
    clipped = NixlBaseConnectorScheduler.get_exchange_clipped_blocks
    assert parameters(clipped) == ["block_ids", "clip_ssm"]
    for place in ("update_state_after_alloc", "request_finished"):
        assert "self.get_exchange_clipped_blocks(" in source(
            getattr(NixlPullConnectorScheduler, place)
        )
    assert "get_unhashed_block_ids_all_groups()" in source(
        NixlPullConnectorScheduler.update_state_after_alloc
    )


def test_the_handshake_compares_the_backends_name():
    text = source(NixlBaseConnectorWorker.register_kv_caches)
    assert "backend_name = self.backend_name" in text
    assert "self.compat_hash = compute_nixl_compatibility_hash(" in text
    assert text.index("backend_name = self.backend_name") < text.index("self.compat_hash")


def test_a_group_that_needs_nothing_would_get_everything():
    text = source(NixlBaseConnectorWorker._apply_prefix_caching)
    assert "prefill_group[-num_decode_blocks:]" in text
    assert "self._apply_prefix_caching(" in source(NixlPullConnectorWorker._read_blocks)
