"""`tests.support.apart` whose decoding engine reads the neighbours of the rows it should."""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

from tests.support.apart import main


def read_neighbours() -> None:
    original = NixlPullConnectorWorker._compute_desc_ids

    def wrong(self: Any, block_ids: Any, **kwargs: Any) -> Any:
        found = original(self, block_ids, **kwargs)
        is_remote = kwargs["block_size_ratio"] is None
        return found - 1 if is_remote else found

    NixlPullConnectorWorker._compute_desc_ids = wrong


if __name__ == "__main__":
    read_neighbours()
    main()
