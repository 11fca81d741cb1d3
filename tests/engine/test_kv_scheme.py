"""A checkpoint's KV cache quantisation, in any format, is switched off before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.refusals import check_sentence, refusal
from tests.support.scheduling import LLAMA, engine_config

FP8 = dict(num_bits=8, type="float", symmetric=True, dynamic=False)
COMPRESSED = dict(
    quant_method="compressed-tensors",
    format="dense",
    quantization_status="compressed",
    ignore=["lm_head"],
    config_groups={},
)
MODELOPT = dict(quant_method="modelopt", quant_algo="FP8", ignore=["lm_head"], producer={})
QUARK_FP8 = dict(dtype="fp8_e4m3", qscheme="per_tensor", is_dynamic=False)

FORMATS: dict[str, dict[str, Any]] = {
    "compressed-tensors": COMPRESSED | dict(kv_cache_scheme=FP8 | dict(strategy="tensor")),
    "compressed-tensors-heads": COMPRESSED | dict(kv_cache_scheme=FP8 | dict(strategy="attn_head")),
    "modelopt": MODELOPT | dict(kv_cache_scheme=FP8),
    "modelopt-by-name": MODELOPT | dict(kv_cache_quant_algo="FP8"),
    "modelopt-nvfp4": MODELOPT | dict(kv_cache_quant_algo="NVFP4"),
}


def model(name: str) -> dict[str, Any]:
    return LLAMA | dict(quantization_config=FORMATS[name])


@pytest.mark.parametrize("name", FORMATS)
def test_the_scheme_is_left(tmp_path, name):
    from fourier_vllm.engine import kv_scheme

    options: dict[str, Any] = dict(attention_backend="fourier", max_model_len=512)
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(kv_scheme.logger, "info_once", lambda *args: said.append(args))
        config = engine_config(tmp_path, model(name), **options)
    assert config.cache_config.cache_dtype == "bfloat16"
    assert "KV cache scheme is not used" in said[0][0]
    config = engine_config(tmp_path, model(name), kv_cache_dtype="bfloat16", **options)
    assert config.cache_config.cache_dtype == "bfloat16"


def test_an_option_that_the_checkpoint_does_not_ask_for(tmp_path):
    message = refusal(tmp_path, model("modelopt-nvfp4"), kv_cache_dtype="fp8")
    check_sentence(message, "--kv-cache-dtype fp8", "leave it out")


def test_the_model_in_float32(tmp_path):
    message = refusal(tmp_path, model("compressed-tensors"), dtype="float32")
    check_sentence(message, "KV cache scheme", "--dtype bfloat16")


def test_other_backends_keep_it(tmp_path):
    config = engine_config(tmp_path, model("modelopt"), max_model_len=512)
    assert config.cache_config.cache_dtype == "fp8_e4m3"
