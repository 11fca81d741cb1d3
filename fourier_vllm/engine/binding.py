"""Binds a layer, once its weights are loaded, to its two caches and to the path of its device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.utils import extract_layer_index

from fourier_vllm.engine.cache.local_cache import SUFFIX, FourierLocalCache
from fourier_vllm.engine.cache.specs import FourierLocalSpec, FourierPageSpec
from fourier_vllm.engine.connectors.choose import row_alignment
from fourier_vllm.engine.fingerprint import compressed_layers
from fourier_vllm.engine.metadata import FourierMetadata
from fourier_vllm.engine.model_weights import UnreadableError, read_projections
from fourier_vllm.engine.refuse import check_stage, no_recipe
from fourier_vllm.engine.sizes import id_bytes, layer_layout, num_local_groups, window_of
from fourier_vllm.page import PAGE_ALIGNMENT, PageLayout
from fourier_vllm.window import Window

if TYPE_CHECKING:
    from fourier_vllm.engine.backend import FourierImpl


class Path(Protocol):
    """What runs the steps of one layer on one kind of device."""

    def prepare(self) -> None:
        """Ask for the most memory that any step needs, while vLLM profiles it."""

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        pages: torch.Tensor,
        local: torch.Tensor,
        metadata: FourierMetadata,
        local_metadata: FourierMetadata,
    ) -> None:
        """One step: store, seal, attend.

        Parameters
        ----------
        q, out : torch.Tensor
            `[T, Hq, D]`.
        k, v : torch.Tensor
            `[T, H, D]`, keys after RoPE.
        pages : torch.Tensor
            `[blocks, 1, 1, page_bytes]` uint8, the page cache.
        local : torch.Tensor
            `[blocks, H, block_size, 2 * D]`, the local cache.
        metadata, local_metadata : FourierMetadata
            Of the two caches.
        """


@dataclass(frozen=True)
class Binding:
    """What a compressed layer is bound to.

    Attributes
    ----------
    layout : PageLayout
        Pages of the layer on this rank.
    window : Window
        Sizes of what is raw.
    local : FourierLocalCache
        The companion that holds raw K and V, registered with vLLM as `local_name`.
    is_derived_from_dummies : bool
        The recipe was measured on, or predicted from, dummy weights.
    """

    layout: PageLayout
    window: Window
    path: Path
    local: FourierLocalCache
    local_name: str
    is_derived_from_dummies: bool


def bind(impl: FourierImpl, layer: Any, name: str) -> Binding:
    """Bind a compressed layer; vLLM finds its two caches afterwards.

    Raises
    ------
    ValueError
        There is no recipe, and none can be predicted.
    """
    engine, config = impl.engine, impl.vllm_config
    model, dtype = config.model_config, layer.kv_cache_torch_dtype
    projections = None
    if engine.recipe is None:
        heads = impl.num_heads, impl.num_kv_heads, impl.head_size
        try:
            projections = read_projections(impl.ancestry, *heads, model.dtype, model.hf_text_config)
        except UnreadableError as reason:
            raise no_recipe(model.hf_config, str(reason)) from None
    ordinal = compressed_layers(model).index(extract_layer_index(name))
    rank, world = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    layout = layer_layout(engine, ordinal, rank, world, dtype.itemsize, projections)
    num_layers, pages_bytes = engine.fingerprint.num_layers, id_bytes(engine, world, layout)
    window = window_of(engine, num_layers * layout.raw_bytes / pages_bytes)
    block_bytes = layout.raw_bytes // window.page_size * window.block_size
    shape: dict[str, Any] = dict(
        num_kv_heads=impl.num_kv_heads, head_size=impl.head_size, dtype=dtype
    )
    layers = config.compilation_config.static_forward_context
    num_groups = num_local_groups(num_layers, pages_bytes, block_bytes)
    if config.parallel_config.pipeline_parallel_size > 1:
        check_stage(num_groups, len(compressed_here(layers)), window.page_size)
    local = FourierLocalCache(
        layer,
        FourierLocalSpec(
            block_size=window.block_size,
            sliding_window=_reach(window, layers),
            page_size=window.page_size,
            local_window=window.local_window,
            num_pinned_blocks=window.num_pinned_blocks,
            num_groups=num_groups,
            exact_prefill=window.exact_prefill,
            **shape,
        ),
    )
    pages = FourierPageSpec(
        block_size=window.page_size,
        block_stride_alignment=max(PAGE_ALIGNMENT, row_alignment(config)),
        num_head_slots=1,
        tokens_per_state=window.page_size,
        state_content_bytes=layout.page_bytes,
        **shape,
    )
    layers[name + SUFFIX] = local
    # Pages differ between layers, and vLLM's hook `customize_spec` knows no layer.
    layer.get_kv_cache_spec = lambda vllm_config: pages
    return Binding(
        layout=layout,
        window=window,
        path=_path(impl, layer, layout, window),
        local=local,
        local_name=name + SUFFIX,
        is_derived_from_dummies=engine.depends_on_weights
        and config.load_config.load_format == "dummy",
    )


def compressed_here(layers: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a worker's layers that get pages, by name."""
    return {
        name: layer
        for name, layer in layers.items()
        if getattr(getattr(layer, "impl", None), "is_compressed", False)
    }


def bind_sliding(layer: Any) -> Callable[..., None]:
    """Bind a layer with a sliding window, on a CPU; returns what runs its steps.

    Blocks of a page's size would be split over many cache groups.
    """
    from fourier_vllm.engine.cpu.sliding import run_step

    stock = type(layer).get_kv_cache_spec.__get__(layer)
    layer.get_kv_cache_spec = lambda config: replace(stock(config), block_size=16)
    return run_step


def _reach(window: Window, layers: Any) -> int:
    """Tokens that the local cache keeps: a number that is no other layer's sliding window."""
    taken = {getattr(layer, "sliding_window", None) for layer in layers.values()}
    reach = window.reach
    while reach in taken:
        reach += 1
    return reach


def _path(impl: FourierImpl, layer: Any, layout: PageLayout, window: Window) -> Path:
    config, dtype = impl.vllm_config, layer.kv_cache_torch_dtype
    device: torch.device = config.device_config.device
    if impl.prompts is None:
        # Imports numba, which machines with a GPU do not need.
        from fourier_vllm.engine.cpu.path import CpuPath

        return CpuPath(layout, window, impl.scale, dtype, device)
    # Imports Triton, which machines without a GPU do not need.
    from fourier_vllm.engine.gpu import triton_cache
    from fourier_vllm.engine.gpu.path import GpuPath

    triton_cache.settle()
    path = GpuPath(
        layout,
        window,
        impl.prompts,
        impl.num_heads,
        impl.scale,
        dtype,
        device,
        config.model_config.max_model_len,
        config.scheduler_config.max_num_seqs,
        config.scheduler_config.max_num_batched_tokens,
    )
    # Sleep at level 2 discards what is allocated here, and restores buffers in place.
    for table, tensor in path.tables.by_name().items():
        layer.register_buffer(f"fourier_{table}", tensor, persistent=False)
    return path
