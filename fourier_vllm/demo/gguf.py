"""Turn a Llama GGUF file into a Hugging Face folder that vLLM loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CONTROL_TOKEN = 3  # GGUF's token type for <|im_start|> and its like


def convert(gguf_file: Path, folder: Path) -> None:
    """Write config, weights and tokenizer of `gguf_file` into `folder`.

    Parameters
    ----------
    gguf_file
        A Llama-architecture GGUF with SmolLM2's byte-level BPE tokenizer.
    folder
        Where to write; created when missing.
    """
    _load_model(gguf_file).save_pretrained(folder)
    _load_tokenizer(gguf_file).save_pretrained(folder, save_jinja_files=False)


def _load_model(gguf_file: Path) -> LlamaForCausalLM:
    """Dequantized weights in bfloat16, the type the model was published in."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    )
    fields = loaded.config.to_dict()
    for name in ("quantization_config", "unk_token_id", "_name_or_path", "_model_name_or_path"):
        fields.pop(name, None)
    fields["dtype"] = "bfloat16"
    fields["rms_norm_eps"] = float(f"{fields['rms_norm_eps']:.6g}")  # undo GGUF's float32 rounding
    # transformers refuses to save a model that it loaded from GGUF: move the weights to a fresh one
    model = LlamaForCausalLM(LlamaConfig(**fields)).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    ids = {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    return model


def _load_tokenizer(gguf_file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer with its digit splitter, which transformers' GGUF loader leaves out."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf_file).fields

    def read(key: str) -> Any:
        return fields[key].contents()

    tokens: list[str] = read("tokenizer.ggml.tokens")
    types: list[int] = read("tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ", 1)) for pair in read("tokenizer.ggml.merges")]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]

    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in control]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=tokens[read("tokenizer.ggml.bos_token_id")],
        eos_token=tokens[read("tokenizer.ggml.eos_token_id")],
        unk_token=tokens[read("tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[read("tokenizer.ggml.padding_token_id")],
        model_max_length=read("llama.context_length"),
        clean_up_tokenization_spaces=False,
        chat_template=read("tokenizer.chat_template"),
    )
