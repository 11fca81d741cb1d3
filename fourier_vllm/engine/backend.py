"""The attention backend `fourier`: binds a layer to its two caches and runs its steps."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from fourier_vllm._text import SUBJECT
from fourier_vllm.config import FourierConfig
from fourier_vllm.engine.cache.local_cache import SUFFIX, FourierLocalBackend, FourierLocalCache
from fourier_vllm.engine.cache.specs import FourierLocalSpec, FourierPageSpec
from fourier_vllm.engine.cpu import sliding
from fourier_vllm.engine.fingerprint import compressed_layers
from fourier_vllm.engine.metadata import FourierMetadata, LayerStep
from fourier_vllm.engine.model_weights import Ancestry, UnreadableError, can_read, read_projections
from fourier_vllm.engine.platform import NAME
from fourier_vllm.engine.refuse import (
    WAY_OUT,
    check_built,
    check_layer,
    check_reload,
    check_shape,
    no_recipe,
)
from fourier_vllm.engine.sizes import id_bytes, layer_layout, num_local_groups, window_of
from fourier_vllm.engine.startup import resolve
from fourier_vllm.kernels.reference.codec import PageCodec
from fourier_vllm.page import PAGE_ALIGNMENT

if TYPE_CHECKING:
    from fourier_vllm.engine.gpu.path import GpuPath
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
        return False

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
        self._engine = resolve(self.vllm_config)
        if sliding_window is None:
            check_shape(self.vllm_config, num_heads, num_kv_heads or num_heads, head_size)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window = sliding_window
        self.local: FourierLocalCache | None = None
        self.gpu: GpuPath | None = None
        self.is_derived_from_dummies = False  # the recipe
        device = self.vllm_config.device_config.device
        if sliding_window is not None and device.type != "cpu":
            raise ValueError(
                f"{SUBJECT} does not support sliding-window layers on a GPU where the model's config has "
                f"no layer_types: {WAY_OUT}."
            )
        if sliding_window is None and self.has_kernels(device):
            self._prompts = self._prompt_attention(device)
        self._ancestry = Ancestry(self, self._check_built)

    def _check_built(self, ancestry: Ancestry) -> None:
        """Refuse, before weights are loaded, what the model around this layer shows."""
        layer: Any = ancestry.layer
        check_built(layer)
        is_whole, is_compressed = ancestry.block is not None, self.sliding_window is None
        model = self.vllm_config.model_config
        if is_compressed and extract_layer_index(layer.layer_name) not in compressed_layers(model):
            raise ValueError(
                f"{SUBJECT} does not support a full-attention layer where the model's config names "
                f"another kind (layer_types): {WAY_OUT}."
            )
        if is_whole and is_compressed and self._engine.recipe is None and not can_read(ancestry):
            raise no_recipe(model.hf_config)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Bind to the layer; vLLM calls it after loading, and again after a weight reload.

        Pages keep their format then: it is part of the engine's sizes and of its CUDA graphs.
        """
        self._ancestry.forget()
        layers = self.vllm_config.compilation_config.static_forward_context
        name, layer = next((n, x) for n, x in layers.items() if getattr(x, "impl", None) is self)
        check_built(layer)
        if self.local is not None:
            check_reload(self.is_derived_from_dummies)
            return
        engine = self._engine
        load_format = self.vllm_config.load_config.load_format
        self.is_derived_from_dummies = engine.recipe is None and load_format == "dummy"
        dtype = layer.kv_cache_torch_dtype
        model = self.vllm_config.model_config
        device = self.vllm_config.device_config.device
        if self.sliding_window is not None:
            stock = type(layer).get_kv_cache_spec.__get__(layer)
            # Pages of the usual 128 tokens would be split over many cache groups.
            layer.get_kv_cache_spec = lambda config: replace(stock(config), block_size=16)
            return
        ordinal = compressed_layers(model).index(extract_layer_index(name))
        projections = None
        if engine.recipe is None:
            heads = self.num_heads, self.num_kv_heads, self.head_size
            try:
                projections = read_projections(
                    self._ancestry, *heads, model.dtype, model.hf_text_config
                )
            except UnreadableError as reason:
                raise no_recipe(model.hf_config, str(reason)) from None
        rank, world = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self.layout = layer_layout(engine, ordinal, rank, world, dtype.itemsize, projections)
        pages_bytes = id_bytes(engine, world, self.layout)
        raw_bytes = engine.fingerprint.num_layers * self.layout.raw_bytes
        self.window = window_of(engine, raw_bytes / pages_bytes)
        if self.has_kernels(device):
            self.gpu = self._gpu_path(dtype, device)
            # Sleep at level 2 discards what is allocated here, and restores buffers in place.
            for table, tensor in self.gpu.tables.by_name().items():
                layer.register_buffer(f"fourier_{table}", tensor, persistent=False)
        else:
            # Imports numba, which machines with a GPU do not need.
            from fourier_vllm.engine.cpu.path import run_step
            from fourier_vllm.kernels.cpu.decode import warm_up

            self.codec, self._run_step = PageCodec(self.layout, dtype, device), run_step
            warm_up(self.codec, dtype)
        self.local = FourierLocalCache(layer, self._local_spec(layer, engine, pages_bytes))
        self.local_name = name + SUFFIX
        layers[self.local_name] = self.local
        layer.get_kv_cache_spec = partial(self._page_spec, layer)

    @staticmethod
    def has_kernels(device: torch.device) -> bool:
        """Whether Triton's kernels run there, or the reference path."""
        return device.type != "cpu"

    def _prompt_attention(self, device: torch.device) -> PromptAttention:
        from fourier_vllm.engine.gpu.prompt_attention import choose

        name = FourierConfig.from_engine(self.vllm_config).prompt_attention
        dtype = self.vllm_config.model_config.dtype
        return choose(name, self.head_size, dtype, self.scale, device)

    def _gpu_path(self, dtype: torch.dtype, device: torch.device) -> GpuPath:
        # Imports Triton, which machines without a GPU do not need.
        from fourier_vllm.engine.gpu import triton_cache
        from fourier_vllm.engine.gpu.path import GpuPath

        triton_cache.settle()

        config = self.vllm_config
        return GpuPath(
            self.layout,
            self.window,
            self._prompts,
            self.num_heads,
            self.scale,
            dtype,
            device,
            config.model_config.max_model_len,
            config.scheduler_config.max_num_seqs,
            config.scheduler_config.max_num_batched_tokens,
        )

    def _page_spec(self, layer: Attention, vllm_config: Any) -> FourierPageSpec:
        return FourierPageSpec(
            block_size=self.window.page_size,
            block_stride_alignment=PAGE_ALIGNMENT,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=layer.kv_cache_torch_dtype,
            num_head_slots=1,
            tokens_per_state=self.window.page_size,
            state_content_bytes=self.layout.page_bytes,
        )

    def _reach(self) -> int:
        """Tokens that the local cache keeps: a number that is no other layer's sliding window."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        windows = {getattr(layer, "sliding_window", None) for layer in layers}
        reach = self.window.reach
        while reach in windows:
            reach += 1
        return reach

    def _local_spec(self, layer: Attention, engine: Any, pages_bytes: int) -> FourierLocalSpec:
        window, num_layers = self.window, engine.fingerprint.num_layers
        block_bytes = self.layout.raw_bytes // window.page_size * window.block_size
        return FourierLocalSpec(
            block_size=window.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=layer.kv_cache_torch_dtype,
            sliding_window=self._reach(),
            page_size=window.page_size,
            local_window=window.local_window,
            num_pinned_blocks=window.num_pinned_blocks,
            num_groups=num_local_groups(num_layers, pages_bytes, block_bytes),
            exact_prefill=window.exact_prefill,
        )

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
        if attn_metadata is None:  # memory profiling
            if self.gpu is not None:
                self.gpu.prepare()
            return output.fill_(0)
        if self.local is None:
            window = self.sliding_window
            assert window is not None
            sliding.run_step(attn_metadata, window, query, key, value, kv_cache, self.scale, output)
            return output
        local_metadata = get_forward_context().attn_metadata[self.local_name]
        step = LayerStep(
            query,
            key,
            value,
            kv_cache.view(torch.uint8),
            self.local.kv_cache,
            output,
            attn_metadata,
            local_metadata,
        )
        if self.gpu is not None:
            self.gpu.run(step)
        else:
            plan = attn_metadata.plan(local_metadata, self.window)
            self._run_step(self.codec, plan, step, self.scale, self.window.sink_tokens)
        return output
