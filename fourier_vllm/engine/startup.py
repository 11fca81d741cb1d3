"""The start of an engine, once, in the process that makes its configuration: check, settle, resolve.

vLLM calls `settle` through the platform's hook before anything is spawned or loaded. Workers get the settled
configuration; their layers call `resolve`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fourier_vllm._text import SUBJECT
from fourier_vllm.calibration.text import read_text
from fourier_vllm.config import WEIGHTS, FourierConfig
from fourier_vllm.engine.connectors.choose import choose_connector
from fourier_vllm.engine.fingerprint import compressed_layers
from fourier_vllm.engine.kv_scheme import leave_kv_scheme
from fourier_vllm.engine.measure.possible import why_not
from fourier_vllm.engine.patches import engine_startup, kv_cache_capacity
from fourier_vllm.engine.platform import member
from fourier_vllm.engine.recipe_choice import EngineRecipe, engine_recipe
from fourier_vllm.engine.refuse import check_engine, check_measurable, check_replaced_weights
from fourier_vllm.engine.start_log import log_predicted


def settle(vllm_config: Any) -> None:
    """Refuse what cannot work, and put what the plugin chooses into the engine's configuration.

    Raises
    ------
    ValueError
        The first problem found, in a sentence that begins with the backend's name.
    """
    import vllm.v1.engine.core  # noqa: F401, for the patch

    engine_startup.listen()
    kv_cache_capacity.install()
    leave_kv_scheme(vllm_config)
    choose_connector(vllm_config)
    check_engine(vllm_config)
    check_measurable(vllm_config)
    engine = resolve(vllm_config)
    options = FourierConfig.from_engine(vllm_config)
    if options.calibration_text is not None:
        with _named():
            read_text(Path(options.calibration_text))  # a worker would find out late
    if engine.recipe is None:
        check_replaced_weights(vllm_config)
    if engine.is_predicted:
        is_wanted = options.recipe == WEIGHTS
        log_predicted(engine.target, None if is_wanted else why_not(vllm_config))
    if vllm_config.device_config.device_type != "cpu":
        leave_sliding_windows(vllm_config)


def resolve(vllm_config: Any) -> EngineRecipe:
    """The recipe of a settled configuration.

    Raises
    ------
    ValueError
        Options or recipe cannot work.
    """
    with _named():
        return engine_recipe(vllm_config)


@contextmanager
def _named() -> Iterator[None]:
    """A recipe's own sentence, which the command line shows as well, begins with the backend's name here."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(SUBJECT):
            raise
        raise ValueError(f"{SUBJECT}: {error}") from None


def leave_sliding_windows(vllm_config: Any) -> None:
    """Choose FOURIER for full attention alone where layers with a sliding window stand beside it.

    There is nothing to compress in those: vLLM chooses their backend as if FOURIER were not there.
    """
    attention, model = vllm_config.attention_config, vllm_config.model_config
    if attention.backend is not member():
        return
    if len(compressed_layers(model)) < model.hf_text_config.num_hidden_layers:
        attention.backend = None
        attention.backend_per_kind.setdefault("full_attention", member())
