"""vLLM's options for a tier below the GPU's memory, turned into the connector that takes sealed pages."""

from __future__ import annotations

from typing import Any

CONNECTOR = "FourierOffloadConnector"
MODULE = "fourier_vllm.engine.offload.connector"
STOCK = "SimpleCPUOffloadConnector"  # which ours is a kind of
SECTOR = 4096  # what reads and writes past the page cache (O_DIRECT) are multiples of


def choose_connector(vllm_config: Any) -> None:
    """Put `FourierOffloadConnector` where the options ask for a tier that it can be.

    These are `--kv-offloading-size`, and vLLM's connector by name in `--kv-transfer-config`. What else these
    options can ask for stays for `refuse.py` to name.
    """
    from vllm.config import KVTransferConfig

    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    size = cache.kv_offloading_size
    if size is not None and cache.kv_offloading_backend == "native":
        if transfer is None:
            transfer = KVTransferConfig(kv_connector=STOCK, kv_role="kv_both")
        if transfer.kv_connector in (None, STOCK, CONNECTOR):
            transfer.kv_connector, transfer.kv_role = STOCK, "kv_both"
            transfer.kv_connector_extra_config["cpu_bytes_to_use"] = int(size * (1 << 30))
            vllm_config.kv_transfer_config = transfer
            # vLLM would choose a connector by it.
            cache.kv_offloading_size = None
    if transfer is not None and transfer.kv_connector == STOCK:
        transfer.kv_connector, transfer.kv_connector_module_path = CONNECTOR, MODULE


def row_alignment(vllm_config: Any) -> int:
    """What the bytes of a block, in all layers together, have to be a multiple of for the tier's sake."""
    transfer = vllm_config.kv_transfer_config
    asked = transfer.kv_connector_extra_config if transfer is not None else {}
    is_direct = asked.get("kv_offload_backend") == "disk" and not asked.get("use_page_cache")
    return SECTOR if is_direct else 1
