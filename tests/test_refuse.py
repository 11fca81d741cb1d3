"""What cannot work ends in the process that builds the configuration, with one sentence."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from fourier_vllm.engine.refuse import check_layer, check_vllm_version
from fourier_vllm.recipe import ModelFingerprint, target_recipe
from tests.scheduling import LLAMA, engine_config

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
    """One sentence of one line that holds `words`."""
    assert len(message.splitlines()) == 1
    assert len(message) < 400
    assert message.isascii()
    assert message.endswith(".")
    assert not re.search(r"\w{2}\. [A-Z]", message), "more than one sentence"
    for word in words:
        assert word in message


def refusal(folder, model=None, **options) -> str:
    with pytest.raises((ValidationError, ValueError)) as caught:
        engine_config(folder, model, attention_backend="fourier", max_model_len=512, **options)
    error = caught.value
    if isinstance(error, ValidationError):
        # vLLM builds its configuration with pydantic, which wraps the sentence.
        (first,) = error.errors()
        error = first["ctx"]["error"]
    return str(error)


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
    check_layer(**LAYER | dict(logits_soft_cap=0.0, extra={"sinks": None, "other": 1}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(alibi_slopes=[0.5]), "ALiBi"),
        (dict(logits_soft_cap=50.0), "soft caps"),
        (dict(attn_type="encoder"), "encoder attention"),
        (dict(attn_type="encoder_only"), "encoder_only attention"),
        (dict(attn_type="encoder_decoder"), "encoder_decoder attention"),
        (dict(kv_sharing_target="model.layers.0.self_attn.attn"), "share another layer's KV cache"),
        (dict(extra={"sinks": object()}), "learned attention sinks"),
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


MODELS = {
    "mla": (
        dict(
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
        ),
        "multi-head latent attention (MLA)",
    ),
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
            sliding_window=64,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        "learned attention sinks",
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
            ["--kv-cache-dtype fp8", "auto, bfloat16, float16"],
            id="fp8-cache",
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
    with pytest.raises(ValidationError, match="speculative decoding"):
        engine_config(
            tmp_path, max_model_len=512, attention_config=per_kind, speculative_config=NGRAM
        )
