"""What cannot work ends in the process that builds the configuration, with one sentence."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fourier_vllm.engine import refuse
from fourier_vllm.engine.refuse import (
    check_reload,
    check_vllm_version,
    no_recipe,
)
from fourier_vllm.engine.startup import settle
from fourier_vllm.recipe import ModelFingerprint, target_recipe
from tests.engine.test_refuse_models import MODELS
from tests.support.refusals import check_sentence, refusal
from tests.support.scheduling import engine_config


@pytest.mark.parametrize(
    "found", ["0.32.0", "0.32.1", "0.33.0", "0.33.9", "0.32.0+cpu", "0.33.0rc1", "0.33.1.dev3+g1"]
)
def test_supported_versions(found):
    check_vllm_version(found)


@pytest.mark.parametrize("found", ["0.31.9", "0.34.0", "0.34.0rc1", "0.9.2", "1.0", "0.34.1+cu130"])
def test_other_versions(found):
    with pytest.raises(ValueError, match="supports vLLM") as caught:
        check_vllm_version(found)
    check_sentence(str(caught.value), ">=0.32,<0.34", found, "install a vLLM in that range")


def test_installed_version():
    check_vllm_version()


@pytest.mark.parametrize(
    ("part", "option", "words"),
    [
        ("model_config", dict(enable_sleep_mode=True), "dummy with --enable-sleep-mode"),
        (None, dict(weight_transfer_config=object()), "dummy with --weight-transfer-config"),
        ("parallel_config", dict(enable_elastic_ep=True), "--enable-elastic-ep"),
    ],
    ids=["sleep", "transfer", "elastic"],
)
def test_recipes_from_weights_that_are_replaced(tmp_path, part, option, words):
    """Pages keep the format that follows from the first weights."""

    def config_of(**options: Any) -> Any:
        config = engine_config(tmp_path, max_model_len=512, **options)
        for name, value in option.items():
            object.__setattr__(getattr(config, part) if part else config, name, value)
        return config

    with pytest.raises(ValueError, match="cannot derive a recipe") as caught:
        settle(config_of())
    check_sentence(str(caught.value), words, "name a recipe in the option `recipe`")
    settle(config_of(additional_config={"fourier": {"target": "lossless"}}))
    if "dummy" in words:
        settle(config_of(load_format="auto"))


def test_weights_that_replace_dummies():
    check_reload(False)
    with pytest.raises(ValueError, match="cannot derive another one") as caught:
        check_reload(True)
    check_sentence(str(caught.value), "--load-format dummy", "name a recipe in the option `recipe`")


def test_advice_does_not_go_round_in_circles():
    """Calibration is a way out for models that can be calibrated alone."""
    from transformers import FalconConfig, LlamaConfig

    check_sentence(str(no_recipe(LlamaConfig())), "make one with `fourier-vllm calibrate`")
    check_sentence(str(no_recipe(FalconConfig())), "cannot be calibrated", "leave out --attention-")


NIXL = dict(kv_connector="NixlConnector", kv_role="kv_consumer")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(
            dict(kv_connector_extra_config=dict(bidirectional_kv_xfer=True)),
            ["bidirectional_kv_xfer", "leave it out"],
            id="both-ways",
        ),
        pytest.param(dict(kv_connector="NixlPushConnector"), ["NixlPushConnector"], id="push"),
    ],
)
def test_nixl(monkeypatch, tmp_path, options, words):
    monkeypatch.setattr(refuse, "find_spec", lambda _: True)
    settle(engine_config(tmp_path, kv_transfer_config=NIXL))
    check_sentence(refusal(tmp_path, kv_transfer_config=NIXL | options), *words)


def test_nixl_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(refuse, "find_spec", lambda _: None)
    check_sentence(refusal(tmp_path, kv_transfer_config=NIXL), "NIXL", "pip install nixl")


NGRAM = dict(method="ngram", num_speculative_tokens=2, prompt_lookup_max=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(
            dict(kv_transfer_config=dict(kv_connector="ExampleConnector", kv_role="kv_both")),
            ["ExampleConnector", "--kv-transfer-config", "leave it out"],
            id="connector",
        ),
        pytest.param(
            dict(
                kv_offloading_size=1.0,
                kv_transfer_config=dict(kv_connector="OffloadingConnector", kv_role="kv_both"),
            ),
            ["OffloadingConnector", "name FourierOffloadConnector"],
            id="other-tier",
        ),
        pytest.param(
            dict(kv_offloading_size=1.0, kv_offloading_backend="lmcache"),
            ["--kv-offloading-backend lmcache", "leave it out"],
            id="lmcache",
        ),
        pytest.param(
            dict(kv_offloading_size=1.0),
            ["on a CPU", "--kv-offloading-size", "leave it out"],
            id="offload-on-cpu",
        ),
        pytest.param(
            dict(decode_context_parallel_size=2, tensor_parallel_size=4),
            ["--decode-context-parallel-size", "use --tensor-parallel-size"],
            id="dcp",
        ),
        pytest.param(
            dict(prefill_context_parallel_size=2),
            ["--prefill-context-parallel-size", "use --tensor-parallel-size"],
            id="pcp",
        ),
        pytest.param(
            dict(kv_cache_dtype="fp8"),
            ["--kv-cache-dtype fp8 for a model in bfloat16", "leave it out"],
            id="fp8-cache",
        ),
        pytest.param(
            dict(kv_cache_dtype="float16"),
            ["--kv-cache-dtype float16 for a model in bfloat16", "leave it out"],
            id="float16-cache",
        ),
        pytest.param(
            dict(kv_cache_dtype="bfloat16", dtype="float16"),
            ["--kv-cache-dtype bfloat16 for a model in float16", "leave it out"],
            id="bfloat16-cache",
        ),
        pytest.param(
            dict(kv_cache_dtype="bfloat16", dtype="float32"),
            ["--kv-cache-dtype bfloat16 for a model in float32", "leave it out"],
            id="cache-of-half-size",
        ),
        pytest.param(
            dict(prefix_match_unit=8), ["--prefix-match-unit", "leave it out"], id="match-unit"
        ),
        pytest.param(
            dict(speculative_config=NGRAM), ["--speculative-config", "leave it out"], id="ngram"
        ),
        pytest.param(
            dict(disable_hybrid_kv_cache_manager=True),
            ["--disable-hybrid-kv-cache-manager", "leave it out"],
            id="one-group-only",
        ),
        pytest.param(
            dict(
                scheduler_reserve_full_isl=False,
                additional_config={"fourier": {"prefill": "exact"}},
            ),
            ["--no-scheduler-reserve-full-isl", "leave it out"],
            id="exact-without-gate",
        ),
        pytest.param(
            dict(load_format="tensorizer"),
            ["--load-format tensorizer", "use --load-format auto"],
            id="loader",
        ),
        pytest.param(dict(enable_dbo=True), ["--enable-dbo", "leave it out"], id="micro-batches"),
        pytest.param(dict(runner="pooling"), ["--runner pooling", "text-generation"], id="pooling"),
        pytest.param(
            dict(additional_config={"fourier": {"taget": "quality"}}),
            ["unknown option 'taget'", "did you mean 'target'"],
            id="unknown-option",
        ),
        pytest.param(
            dict(additional_config={"fourier": {"target": "qualty"}}),
            ["target", "'qualty'", "did you mean 'quality'"],
            id="unknown-target",
        ),
        pytest.param(
            dict(additional_config={"fourier": "quality"}),
            ["object of options", "--additional-config"],
            id="not-an-object",
        ),
        pytest.param(
            dict(additional_config={"Fourrier": {}}), ["'Fourrier'", "'fourier'"], id="misspelt-key"
        ),
        pytest.param(
            dict(additional_config={"fourier": {"recipe": "/no/such.json"}}),
            ["'/no/such.json' does not exist", "check the path"],
            id="no-recipe-file",
        ),
        pytest.param(
            dict(additional_config={"fourier": {"page_size": 32, "local_block_size": 64}}),
            ["local_block_size", "divides a page of 32"],
            id="block-above-page",
        ),
    ],
)
def test_options(tmp_path, options, words):
    check_sentence(refusal(tmp_path, **options), *words)


def recipe_of(path, **changes) -> str:
    shape: dict[str, Any] = dict(
        architecture="LlamaForCausalLM",
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_size=32,
        rope_theta=10000.0,
    )
    target_recipe(ModelFingerprint(**shape | changes), "paper").save(path)
    return str(path)


@pytest.mark.parametrize(
    "changes",
    [
        dict(architecture="Qwen2ForCausalLM"),
        dict(num_layers=3),
        dict(num_heads=8),
        dict(num_kv_heads=4),
        dict(head_size=64),
        dict(rope_theta=500000.0),
    ],
    ids=lambda x: next(iter(x)),
)
def test_recipe_of_another_model(tmp_path, changes):
    path = recipe_of(tmp_path / "r.json", **changes)
    message = refusal(tmp_path, additional_config={"fourier": {"recipe": path}})
    check_sentence(message, next(iter(changes)), "found", "fourier-vllm calibrate")


def test_what_works_is_taken(tmp_path):
    path = recipe_of(tmp_path / "r.json")
    for options in (
        dict[str, Any](),
        dict(additional_config={"fourier": {"recipe": path, "prefill": "exact"}}),
        dict(additional_config={"other_plugin": 1}),
        dict(kv_cache_dtype="bfloat16"),
        dict(tensor_parallel_size=2),
        dict(enable_prefix_caching=False),
    ):
        engine_config(tmp_path, attention_backend="fourier", max_model_len=512, **options)


def test_chosen_for_one_kind_of_layer_only(tmp_path):
    """`backend_per_kind` counts as a choice."""
    per_kind = {"backend_per_kind": {"full_attention": "fourier"}}
    message = refusal(
        tmp_path, attention_backend=None, attention_config=per_kind, speculative_config=NGRAM
    )
    check_sentence(message, "speculative decoding")


def test_batch_invariance(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    check_sentence(refusal(tmp_path), "VLLM_BATCH_INVARIANT", "unset it")


def test_errors_of_vllm_stay_as_they_are(tmp_path):
    with pytest.raises(ValidationError):
        engine_config(tmp_path, attention_backend="fourier", max_model_len=1 << 30)


def test_nothing_is_refused_for_other_backends(tmp_path):
    """Inert until selected: the same options pass."""
    model, _ = MODELS["soft-cap"]
    engine_config(tmp_path, model, max_model_len=512)
    options: dict[str, Any] = dict(
        additional_config={"fourier": {"taget": 1}}, speculative_config=NGRAM
    )
    engine_config(tmp_path, max_model_len=512, **options)
