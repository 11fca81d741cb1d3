"""The attention backend `fourier`: binds a layer to its two caches and runs its steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from fourier_vllm._text import SUBJECT
from fourier_vllm.config import FourierConfig
from fourier_vllm.engine.binding import Binding, bind, bind_sliding, compressed_here
from fourier_vllm.engine.cache.local_cache import FourierLocalBackend
from fourier_vllm.engine.cache.specs import FourierPageSpec
from fourier_vllm.engine.fingerprint import compressed_layers
from fourier_vllm.engine.metadata import FourierMetadata
from fourier_vllm.engine.model_weights import Ancestry, can_read
from fourier_vllm.engine.platform import NAME
from fourier_vllm.engine.refuse import (
    WAY_OUT,
    check_built,
    check_layer,
    check_reload,
    check_shape,
    no_recipe,
)
from fourier_vllm.engine.startup import resolve

if TYPE_CHECKING:
    from fourier_vllm.engine.gpu.prompt_attention import PromptAttention

logger = init_logger("vllm.fourier_vllm")


class FourierBackend(FourierLocalBackend):
    """Sealed Fourier pages for old tokens, raw blocks for recent ones."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[FourierImpl]:
        return FourierImpl

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return True  # `refuse.py` lets only ours pass

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        return True  # a checkpoint's, which are loaded and never applied: see kv_scheme.py

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        if isinstance(spec, FourierPageSpec | SlidingWindowSpec):
            return spec
        raise ValueError(
            f"{SUBJECT} was bypassed by this model loader, which never finished its "
            f"layers: use --load-format auto, or {WAY_OUT}."
        )


class FourierImpl(AttentionImpl):
    """One layer. A layer with a sliding window of its own is run uncompressed."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        check_layer(
            head_size=head_size,
            alibi_slopes=alibi_slopes,
            logits_soft_cap=logits_soft_cap,
            attn_type=attn_type,
            kv_sharing_target=kv_sharing_target_layer_name,
            extra=extra,
        )
        self.vllm_config = get_current_vllm_config()
        self.engine = resolve(self.vllm_config)
        if sliding_window is None:
            check_shape(self.vllm_config, num_heads, num_kv_heads or num_heads, head_size)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window = sliding_window
        self.is_compressed = sliding_window is None
        self.bound: Binding | None = None
        self.is_loaded = False
        self.run_sliding: Callable[..., None] | None = None
        self.prompts: PromptAttention | None = None  # on a GPU
        device = self.vllm_config.device_config.device
        if sliding_window is not None and device.type != "cpu":
            raise ValueError(
                f"{SUBJECT} does not support sliding-window layers on a GPU where the model's config has "
                f"no layer_types: {WAY_OUT}."
            )
        if sliding_window is None and self.has_kernels(device):
            self.prompts = self._prompt_attention(device)
        self.ancestry = Ancestry(self, self._check_built)

    def _check_built(self, ancestry: Ancestry) -> None:
        """Refuse, before weights are loaded, what the model around this layer shows."""
        layer: Any = ancestry.layer
        check_built(layer)
        is_whole, is_compressed = ancestry.block is not None, self.is_compressed
        model = self.vllm_config.model_config
        if is_compressed and extract_layer_index(layer.layer_name) not in compressed_layers(model):
            raise ValueError(
                f"{SUBJECT} does not support a full-attention layer where the model's config names "
                f"another kind (layer_types): {WAY_OUT}."
            )
        if is_whole and is_compressed and self.engine.is_predicted and not can_read(ancestry):
            raise no_recipe(model.hf_config)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Bind to the layer; vLLM calls it after loading, and again after a weight reload.

        Pages keep their format then: it is part of the engine's sizes and of its CUDA graphs.
        """
        self.ancestry.forget()
        layers = self.vllm_config.compilation_config.static_forward_context
        name, layer = next((n, x) for n, x in layers.items() if getattr(x, "impl", None) is self)
        check_built(layer)
        if self.bound is not None:
            check_reload(self.bound.is_derived_from_dummies)
        elif self.sliding_window is not None:
            self.run_sliding = bind_sliding(layer)
        elif self.engine.is_measured:  # not yet bound
            self.is_loaded = True
            self._bind_all(layers)
        else:
            self.bound = bind(self, layer, name)

    def _bind_all(self, layers: Mapping[str, Any]) -> None:
        """Once the last layer is loaded, and with it the model, measure it and bind all layers."""
        ours = compressed_here(layers)
        if not all(layer.impl.is_loaded for layer in ours.values()):
            return
        from fourier_vllm.engine.measure.start import settled

        attention = {name: x for name, x in layers.items() if isinstance(x, Attention)}
        engine = settled(self.engine, self.vllm_config, attention)
        for name, layer in ours.items():
            layer.impl.engine = engine
            layer.impl.bound = bind(layer.impl, layer, name)

    @staticmethod
    def has_kernels(device: torch.device) -> bool:
        """Whether Triton's kernels run there, or the reference path."""
        return device.type != "cpu"

    def _prompt_attention(self, device: torch.device) -> PromptAttention:
        from fourier_vllm.engine.gpu.prompt_attention import choose

        name = FourierConfig.from_engine(self.vllm_config).prompt_attention
        dtype = self.vllm_config.model_config.dtype
        return choose(name, self.head_size, dtype, self.scale, device)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FourierMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """vLLM's interface: `query, output [T, Hq, D]`, `key, value [T, H, D]`, any strides."""
        bound = self.bound
        if attn_metadata is None:  # memory profiling
            if bound is not None:
                bound.path.prepare()
            return output.fill_(0)
        if bound is None:
            window = self.sliding_window
            assert self.run_sliding is not None
            self.run_sliding(attn_metadata, window, query, key, value, kv_cache, self.scale, output)
            return output
        local_metadata = get_forward_context().attn_metadata[bound.local_name]
        bound.path.run(
            query,
            key,
            value,
            output,
            kv_cache.view(torch.uint8),
            bound.local.kv_cache,
            attn_metadata,
            local_metadata,
        )
        return output
