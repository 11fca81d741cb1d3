"""One of two engines that share the work: one prefills, the other decodes.

    python -m tests.support.apart prefill|decode MODEL FOLDER SETTINGS

The two meet in FOLDER. SETTINGS is JSON: `fourier`, the plugin's options, `options` of the engine and `port`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tests.support.engine import engine, prompts, tokens

MAX_WAIT = 120  # seconds
PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def wait_for(file: Path) -> None:
    end = time.monotonic() + MAX_WAIT
    while not file.exists():
        assert time.monotonic() < end, f"{file.name} did not come"
        time.sleep(0.2)


def write(file: Path, found: Any) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.rename(file)


def ask(llm: Any, ids: list[int], max_tokens: int, params: dict[str, Any] | None) -> Any:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        detokenize=False,
        ignore_eos=True,
        extra_args={"kv_transfer_params": params},
    )
    (output,) = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    return output


def prefill(llm: Any, folder: Path) -> None:
    """Prefill all prompts, and hold what was made until the other engine is done."""
    write(folder / "made.json", [ask(llm, x, 1, PREFILL).kv_transfer_params for x in prompts()])
    wait_for(folder / "done")


def decode(llm: Any, folder: Path) -> None:
    wait_for(folder / "made.json")
    made = json.loads((folder / "made.json").read_text())
    found = [ask(llm, ids, 40, params) for ids, params in zip(prompts(), made, strict=True)]
    hits = "vllm:external_prefix_cache_hits"
    pulled = sum(m.value for m in llm.get_metrics() if m.name == hits)
    reasons = [x.outputs[0].finish_reason for x in found]
    write(folder / "out.json", {"tokens": tokens(found), "pulled": pulled, "reasons": reasons})


def main() -> None:
    role, model, folder, text = sys.argv[1:]
    settings = json.loads(text)
    os.environ |= {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(settings["port"]),
    }
    transfer = {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_producer" if role == "prefill" else "kv_consumer",
    }
    options = settings["options"] | {"disable_log_stats": False, "kv_transfer_config": transfer}
    with engine(model, settings["fourier"], **options) as llm:
        (prefill if role == "prefill" else decode)(llm, Path(folder))


if __name__ == "__main__":
    main()
