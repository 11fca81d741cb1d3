"""vLLM's options for KV connectors, turned into the connectors that take sealed pages."""

from __future__ import annotations

from typing import Any

OFFLOAD, NIXL = "FourierOffloadConnector", "FourierNixlConnector"
# What steps in for vLLM's, by the name that a user gives.
OURS = {
    "SimpleCPUOffloadConnector": OFFLOAD,
    "NixlConnector": NIXL,
    "NixlPullConnector": NIXL,
    OFFLOAD: OFFLOAD,
    NIXL: NIXL,
}
MODULES = {
    OFFLOAD: "fourier_vllm.engine.connectors.offload",
    NIXL: "fourier_vllm.engine.connectors.nixl",
}
SECTOR = 4096  # what reads and writes past the page cache (O_DIRECT) are multiples of


def choose_connector(vllm_config: Any) -> None:
    """Put our connector where `--kv-transfer-config` names one that it is a kind of.

    `--kv-offloading-size` asks for `FourierOffloadConnector`. What else these options can ask for stays for
    `refuse.py` to name.
    """
    from vllm.config import KVTransferConfig

    cache, transfer = vllm_config.cache_config, vllm_config.kv_transfer_config
    size = cache.kv_offloading_size
    if size is not None and cache.kv_offloading_backend == "native":
        if transfer is None:
            transfer = KVTransferConfig(kv_connector=OFFLOAD, kv_role="kv_both")
        if transfer.kv_connector is None or OURS.get(transfer.kv_connector) == OFFLOAD:
            transfer.kv_connector, transfer.kv_role = OFFLOAD, "kv_both"
            transfer.kv_connector_extra_config["cpu_bytes_to_use"] = int(size * (1 << 30))
            vllm_config.kv_transfer_config = transfer
            # vLLM would choose a connector by it.
            cache.kv_offloading_size = None
    if transfer is not None and transfer.kv_connector in OURS:
        transfer.kv_connector = OURS[transfer.kv_connector]
        transfer.kv_connector_module_path = MODULES[transfer.kv_connector]


def row_alignment(vllm_config: Any) -> int:
    """What the bytes of a block, in all layers together, have to be a multiple of for the tier's sake."""
    transfer = vllm_config.kv_transfer_config
    asked = transfer.kv_connector_extra_config if transfer is not None else {}
    is_direct = asked.get("kv_offload_backend") == "disk" and not asked.get("use_page_cache")
    return SECTOR if is_direct else 1
