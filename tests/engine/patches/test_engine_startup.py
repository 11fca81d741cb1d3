"""A refusal travels from an engine's process to the one that waits for it."""

from __future__ import annotations

import logging
import os

import pytest
from vllm.v1.engine import utils

from fourier_vllm.engine.patches import engine_startup

SENTENCE = "attention backend fourier does not support this: leave it out."


@pytest.fixture
def listening(monkeypatch):
    """Both ends of the line, over an engine that fails to start."""

    def fail() -> None:
        raise RuntimeError("Engine core initialization failed.")

    monkeypatch.setattr(utils, "wait_for_engine_startup", fail)
    monkeypatch.setenv(engine_startup.VARIABLE, "")  # restored afterwards
    logger = logging.getLogger("vllm")
    monkeypatch.setattr(logger, "handlers", list(logger.handlers))
    engine_startup.listen()
    engine_startup.speak()
    return logging.getLogger("vllm.v1.engine.core")


def log(logger: logging.Logger, error: Exception) -> None:
    try:
        raise error
    except type(error):
        logger.exception("EngineCore failed to start.")


@pytest.mark.parametrize(
    "text", [SENTENCE, f"ray::Worker.load()\n  File x.py\nValueError: {SENTENCE}"], ids=["", "ray"]
)
def test_a_refusal_arrives(listening, text):
    log(listening, ValueError(text))
    log(listening, RuntimeError("another worker was first"))
    with pytest.raises(ValueError, match="does not support this") as caught:
        utils.wait_for_engine_startup()
    assert str(caught.value) == SENTENCE
    assert not os.path.exists(os.environ[engine_startup.VARIABLE]), "left behind"


def test_other_failures_stay_as_they_are(listening):
    log(listening, ValueError("of vLLM's own"))
    listening.error("no exception: %s", SENTENCE)
    with pytest.raises(RuntimeError, match="initialization failed"):
        utils.wait_for_engine_startup()


def test_twice_is_once(listening):
    before, handlers = utils.wait_for_engine_startup, list(logging.getLogger("vllm").handlers)
    engine_startup.listen()
    engine_startup.speak()
    assert utils.wait_for_engine_startup is before
    assert logging.getLogger("vllm").handlers == handlers
