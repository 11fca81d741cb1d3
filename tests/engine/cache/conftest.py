"""The config of an engine of a small model."""

from __future__ import annotations

import pytest

from tests.support.scheduling import engine_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Maker of engine configurations; each call gives a fresh one."""
    folder = tmp_path_factory.mktemp("model")

    def make(max_model_len: int = 512, max_num_seqs: int = 4, max_num_batched_tokens: int = 96):
        return engine_config(
            folder,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )

    return make
