"""A client of an OpenAI-compatible server on this machine."""

from __future__ import annotations

from typing import Any


def openai_client(url: str, timeout: float) -> Any:
    """For `url`, without `/v1`; no proxy between us and loopback. `timeout` in seconds."""
    from openai import DefaultHttpxClient, OpenAI

    return OpenAI(
        base_url=f"{url}/v1",
        api_key="none",
        timeout=timeout,
        http_client=DefaultHttpxClient(trust_env=False),
    )
