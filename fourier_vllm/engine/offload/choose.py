"""Which connector an engine's options ask for, and ours in its place."""

from __future__ import annotations

from typing import Any

CONNECTOR = "FourierOffloadConnector"
MODULE = "fourier_vllm.engine.offload.connector"


def settle_offload(vllm_config: Any) -> None:
    """Put our connector where `--kv-offloading-size` or `--kv-transfer-config` ask for vLLM's.

    `check_engine` has let nothing else pass. vLLM names its own connector after the platform's hook for
    `--kv-offloading-size`, so this option ends here.
    """
    from vllm.config import KVTransferConfig

    cache = vllm_config.cache_config
    gib = getattr(cache, "kv_offloading_size", None)
    if gib:
        cache.kv_offloading_size = None
        vllm_config.kv_transfer_config = KVTransferConfig(
            kv_role="kv_both", kv_connector_extra_config={"cpu_bytes_to_use": int(gib * (1 << 30))}
        )
    transfer = vllm_config.kv_transfer_config
    if transfer is not None:
        transfer.kv_connector, transfer.kv_connector_module_path = CONNECTOR, MODULE
