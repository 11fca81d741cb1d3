"""Whether an engine can measure its model; known before anything is loaded."""

from __future__ import annotations

from typing import Any

from fourier_vllm.calibration.text import MIN_PAGES
from fourier_vllm.config import MEASURED, FourierConfig


def why_not(vllm_config: Any) -> str | None:
    """The reason, as a clause, or None where the model can be measured."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    options = FourierConfig.from_engine(vllm_config)
    if vllm_config.device_config.device_type == "cpu" and not options.asks_to_measure:
        return 'a CPU takes minutes for it, for which the option "recipe": "measured" asks'
    if vllm_config.load_config.load_format == "dummy" and options.recipe != MEASURED:
        return "--load-format dummy has no weights"
    if model.skip_tokenizer_init:
        return "--skip-tokenizer-init leaves it without a tokenizer"
    if parallel.data_parallel_size > 1 and parallel.is_moe_model is not False:
        return "its experts are shared by data-parallel engines"
    least = MIN_PAGES * options.geometry().page_size
    if context_of(model) < least:
        return f"a context of {context_of(model)} tokens is shorter than the {least} that it takes"
    return None


def context_of(model_config: Any) -> int:
    """Longest text that the model takes, whatever requests are limited to."""
    longest = getattr(model_config.hf_text_config, "max_position_embeddings", None)
    return longest or model_config.max_model_len
