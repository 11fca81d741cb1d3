"""Models that are refused, each in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.refusals import DECODER, FALCON, SIZES, check_sentence, refusal
from tests.support.scheduling import LLAMA, engine_config

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
    "alibi-by-choice": (dict(FALCON, alibi=True), "ALiBi"),
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
