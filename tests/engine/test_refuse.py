"""What cannot work ends in the process that builds the configuration, with one sentence."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention

from fourier_vllm.engine.refuse import (
    check_built,
    check_layer,
    check_reload,
    check_vllm_version,
    no_recipe,
)
from fourier_vllm.engine.startup import settle
from fourier_vllm.recipe import ModelFingerprint, target_recipe
from tests.support.scheduling import LLAMA, engine_config

SIZES: dict[str, Any] = dict(vocab_size=512, max_position_embeddings=2048, dtype="bfloat16")
DECODER: dict[str, Any] = dict(
    SIZES,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)


def check_sentence(message: str, *words: str) -> None:
    """One sentence of one line about the backend that holds `words`."""
    assert message.startswith("attention backend fourier")
    assert len(message.splitlines()) == 1
    assert len(message) < 400
    assert message.isascii()
    assert message.endswith(".")
    assert not re.search(r"\w{2}\. [A-Z]", message), "more than one sentence"
    for word in words:
        assert word in message


def refusal(folder, model=None, **options) -> str:
    """What ends the start in the user's own process; the folder has no weights to load."""
    options = dict(attention_backend="fourier", max_model_len=512, load_format="auto") | options
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        engine_config(folder, model, **options)
    assert type(caught.value) is ValueError, "pydantic's text, not ours"
    return str(caught.value)


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


LAYER: dict[str, Any] = dict(
    head_size=64,
    alibi_slopes=None,
    logits_soft_cap=None,
    attn_type="decoder",
    kv_sharing_target=None,
    extra={},
)


@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 112, 128, 192, 256])
def test_good_layers(head_size):
    check_layer(**LAYER | dict(head_size=head_size))
    check_layer(**LAYER | dict(logits_soft_cap=0.0, extra={"sinks": None, "chunk_lookback": -1}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(alibi_slopes=[0.5]), "ALiBi"),
        (dict(logits_soft_cap=50.0), "soft caps"),
        (dict(attn_type="encoder"), "encoder attention"),
        (dict(attn_type="encoder_only"), "encoder_only attention"),
        (dict(attn_type="encoder_decoder"), "encoder_decoder attention"),
        (dict(kv_sharing_target="model.layers.0.self_attn.attn"), "share another layer's KV cache"),
        (dict(extra={"sinks": torch.ones(4)}), "learned attention sinks"),
        (
            dict(extra={"layer_idx": 1, "dual_chunk_attention_config": {"chunk_size": 64}}),
            "dual chunk attention",
        ),
        (dict(extra={"chunk_lookback": 2}), "chunked attention"),
        (dict(extra={"of_another_vllm": 1}), "the argument 'of_another_vllm' of attention layers"),
        (dict(head_size=16), "head size 16 (multiples of 8 from 32 to 256 work)"),
        (dict(head_size=36), "head size 36"),
        (dict(head_size=264), "head size 264"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_layers(changes, words):
    with pytest.raises(ValueError, match="attention backend fourier") as caught:
        check_layer(**LAYER | changes)
    check_sentence(str(caught.value), words, "leave out --attention-backend fourier")


def make_layer(config, num_heads: int, num_kv_heads: int, head_size: int, **options) -> None:
    """A layer of a model with 4 query heads and 2 KV heads of 32, as vLLM's models make them."""
    with set_current_vllm_config(config):
        Attention(
            num_heads, head_size, 1.0, num_kv_heads, cache_config=config.cache_config, **options
        )


@pytest.mark.parametrize("world", [1, 2, 4])
def test_layers_of_other_shapes(tmp_path, world):
    """Models may give layers heads of their own, where recipes and scratch are made for one shape."""
    sizes = dict(tensor_parallel_size=world, distributed_executor_backend="mp")
    config = engine_config(tmp_path, attention_backend="fourier", max_model_len=512, **sizes)
    good = 4 // world, max(2 // world, 1), 32
    make_layer(config, *good, prefix="layers.0.attn")
    others = {(8, good[1], 32), (good[0], good[0], 32), (good[0], good[1], 64)} - {good}
    for i, bad in enumerate(others, 1):
        with pytest.raises(ValueError, match="layers of different shapes") as caught:
            make_layer(config, *bad, prefix=f"layers.{i}.attn")
        words = f"{bad} in one, {good} in the model's config", "leave out --attention-backend"
        check_sentence(str(caught.value), *words)
    # What has a sliding window of its own is not compressed.
    make_layer(config, 4, 1, 32, prefix="layers.4.attn", per_layer_sliding_window=64)


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


def test_built_layers():
    def layer(kind: Any, values: int) -> Any:
        made = object.__new__(kind)
        made.__dict__.update(head_size=64, head_size_v=values)
        return made

    check_built(layer(Attention, 64))
    for built, words in (
        (layer(Attention, 32), "values of 32 dims beside keys of 64"),
        (layer(ChunkedLocalAttention, 64), "does not support ChunkedLocalAttention"),
    ):
        with pytest.raises(ValueError, match="does not support") as caught:
            check_built(built)
        check_sentence(str(caught.value), words, "leave out --attention-backend fourier")


def test_advice_does_not_go_round_in_circles():
    """Calibration is a way out for models that can be calibrated alone."""
    from transformers import FalconConfig, LlamaConfig

    check_sentence(str(no_recipe(LlamaConfig())), "make one with `fourier-vllm calibrate`")
    check_sentence(str(no_recipe(FalconConfig())), "cannot be calibrated", "leave out --attention-")


SINKS = "learned attention sinks"
SLIDING_AND_FULL = dict(sliding_window=64, layer_types=["sliding_attention", "full_attention"])

MLA: dict[str, Any] = dict(
    SIZES,
    architectures=["DeepseekV2ForCausalLM"],
    model_type="deepseek_v2",
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    kv_lora_rank=32,
    q_lora_rank=None,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    first_k_dense_replace=1,
    topk_method="greedy",
    n_group=1,
    topk_group=1,
)

MODELS = {
    "mla": (MLA, "multi-head latent attention (MLA)"),
    "sparse": (dict(MLA, index_topk=8), "sparse attention"),
    "encoder-decoder": (
        dict(
            SIZES,
            architectures=["WhisperForConditionalGeneration"],
            model_type="whisper",
            d_model=128,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            max_target_positions=512,
            num_mel_bins=80,
            **dict.fromkeys(
                ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"), 1
            ),
        ),
        "encoder-decoder models",
    ),
    "soft-cap": (
        dict(
            DECODER,
            architectures=["Gemma2ForCausalLM"],
            model_type="gemma2",
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            sliding_window=256,
            query_pre_attn_scalar=32,
        ),
        "attn_logit_softcapping",
    ),
    "sliding-windows-alone": (
        dict(
            DECODER,
            architectures=["MistralForCausalLM"],
            model_type="mistral",
            sliding_window=256,
        ),
        "add --disable-sliding-window",
    ),
    "alibi-always": (
        dict(
            SIZES,
            architectures=["BloomForCausalLM"],
            model_type="bloom",
            hidden_size=128,
            n_layer=2,
            n_head=4,
        ),
        "ALiBi",
    ),
    "alibi-by-choice": (
        dict(
            SIZES,
            architectures=["FalconForCausalLM"],
            model_type="falcon",
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            alibi=True,
            multi_query=True,
        ),
        "ALiBi",
    ),
    "learned-sinks": (
        dict(
            DECODER,
            architectures=["GptOssForCausalLM"],
            model_type="gpt_oss",
            num_local_experts=2,
            num_experts_per_tok=1,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            **SLIDING_AND_FULL,
        ),
        SINKS,
    ),
    "learned-sinks-in-granite": (
        dict(
            DECODER,
            architectures=["GraniteForCausalLM"],
            model_type="granite",
            **SLIDING_AND_FULL,
        ),
        SINKS,
    ),
    "shared-kv": (
        dict(
            DECODER,
            architectures=["Gemma3nForCausalLM"],
            model_type="gemma3n_text",
            num_kv_shared_layers=1,
            vocab_size_per_layer_input=512,
            **SLIDING_AND_FULL,
        ),
        "layers that share another layer's KV cache",
    ),
    "chunks": (
        dict(
            DECODER,
            architectures=["Llama4ForCausalLM"],
            model_type="llama4_text",
            attention_chunk_size=64,
            no_rope_layers=[1, 0],
            num_local_experts=2,
            intermediate_size_mlp=192,
        ),
        "chunked attention",
    ),
    "dual-chunks": (
        dict(
            DECODER,
            architectures=["Qwen2ForCausalLM"],
            model_type="qwen2",
            dual_chunk_attention_config=dict(chunk_size=128, local_size=64),
        ),
        "dual chunk attention",
    ),
    "small-heads": (
        dict(DECODER | dict(head_dim=16), architectures=["LlamaForCausalLM"], model_type="llama"),
        "head size 16 (multiples of 8 from 32 to 256 work)",
    ),
    "large-heads": (
        dict(DECODER | dict(head_dim=512), architectures=["LlamaForCausalLM"], model_type="llama"),
        "head size 512",
    ),
    "other-kinds-of-layers": (
        dict(
            DECODER,
            architectures=["LlamaForCausalLM"],
            model_type="llama",
            layer_types=["full_attention", "compressed_sparse_attention"],
        ),
        "layers of type 'compressed_sparse_attention'",
    ),
    "hybrid-of-layers": (
        dict(
            DECODER,
            architectures=["JambaForCausalLM"],
            model_type="jamba",
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=2,
            mamba_d_state=16,
            mamba_d_conv=4,
            mamba_expand=2,
            mamba_dt_rank=8,
        ),
        "state-space",
    ),
    "hybrid-of-heads": (
        dict(
            DECODER,
            architectures=["FalconH1ForCausalLM"],
            model_type="falcon_h1",
            mamba_d_ssm=128,
            mamba_n_heads=4,
            mamba_d_head=32,
            mamba_n_groups=1,
            mamba_d_state=16,
        ),
        "state-space",
    ),
    "no-attention": (
        dict(
            SIZES,
            architectures=["MambaForCausalLM"],
            model_type="mamba",
            hidden_size=128,
            intermediate_size=256,
            state_size=16,
            num_hidden_layers=2,
            conv_kernel=4,
            expand=2,
            time_step_rank=8,
        ),
        "state-space",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(tmp_path, name):
    model, words = MODELS[name]
    check_sentence(refusal(tmp_path, model), words, "leave out --attention-backend fourier")


def test_models_without_a_cap_are_taken(tmp_path):
    """The field alone is no reason: many configs carry it as null."""
    model = dict(LLAMA, attn_logit_softcapping=None, alibi=False, sliding_window=None)
    engine_config(tmp_path, model, attention_backend="fourier", max_model_len=512)


NGRAM = dict(method="ngram", num_speculative_tokens=2, prompt_lookup_max=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(
            dict(kv_transfer_config=dict(kv_connector="ExampleConnector", kv_role="kv_both")),
            ["--kv-transfer-config", "leave it out"],
            id="connector",
        ),
        pytest.param(
            dict(kv_offloading_size=1.0), ["--kv-offloading-size", "leave it out"], id="offload"
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


def test_nothing_is_refused_for_other_backends(tmp_path):
    """Inert until selected: the same options pass."""
    model, _ = MODELS["soft-cap"]
    engine_config(tmp_path, model, max_model_len=512)
    options: dict[str, Any] = dict(
        additional_config={"fourier": {"taget": 1}}, speculative_config=NGRAM
    )
    engine_config(tmp_path, max_model_len=512, **options)


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
