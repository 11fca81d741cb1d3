"""Makes the name FOURIER selectable, and the CPU platform honour the choice.

Three of the platform's classmethods are wrapped: `get_attn_backend_cls` of the CPU platform (it ignores
every selection but CPU_ATTN), `check_and_update_config` of the platform in use (so that what cannot work
is refused in the user's own process, before anything is spawned or loaded), and the CPU platform's
`register_triton_kernel_overrides` (it looks into every loaded module and stumbles over one of numba's).
`patches/` has the other places where vLLM has no hook.
All pass straight through unless FOURIER is selected or numba is loaded; tests/engine/test_upstream.py fails
when upstream moves.
"""

from __future__ import annotations

import sys
from typing import Any

NAME = "FOURIER"
SCAN_BREAKER = "llvmlite.binding.ffi"
BACKEND_PATH = "fourier_vllm.engine.backend.FourierBackend"


def member() -> Any:
    """The FOURIER member of vLLM's AttentionBackendEnum, made on first use in whatever process."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    backend = AttentionBackendEnum.__members__.get(NAME)
    if backend is None:
        backend = AttentionBackendEnum.register(NAME, BACKEND_PATH)
        # Members pickle by value, and spawned processes unpickle the config before they load plugins;
        # pickling a call of this function instead makes unpickling register the name first.
        backend.__reduce_ex__ = lambda protocol: (member, ())
    return backend


def is_selected(vllm_config: Any) -> bool:
    """Whether FOURIER was chosen for any kind of layer."""
    attention = vllm_config.attention_config
    per_kind = getattr(attention, "backend_per_kind", None) or {}
    return member() in (attention.backend, *per_kind.values())


def install() -> None:
    """Register the name, wrap the platform's hooks and apply patches; a second call does nothing."""
    from vllm.platforms import current_platform

    from fourier_vllm.engine.patches import engine_args, engine_startup

    member()
    engine_args.install()
    engine_startup.speak()
    platform = type(current_platform)
    if getattr(platform, "_fourier_installed", False):
        return
    _wrap_config_check(platform)
    if current_platform.is_cpu():
        _wrap_cpu_selection(platform)
        _wrap_kernel_scan(platform)
    platform._fourier_installed = True


def _wrap_config_check(platform: Any) -> None:
    original = platform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        if is_selected(vllm_config):
            from fourier_vllm.engine.startup import settle

            settle(vllm_config)
        original(cls, vllm_config)

    platform.check_and_update_config = classmethod(check_and_update_config)


def _wrap_kernel_scan(platform: Any) -> None:
    original = platform.register_triton_kernel_overrides.__func__

    def register_triton_kernel_overrides(cls: Any) -> None:
        # An object in there makes up a C function for every attribute it is asked for.
        hidden = sys.modules.pop(SCAN_BREAKER, None)
        try:
            original(cls)
        finally:
            if hidden is not None:
                sys.modules[SCAN_BREAKER] = hidden

    platform.register_triton_kernel_overrides = classmethod(register_triton_kernel_overrides)


def _wrap_cpu_selection(platform: Any) -> None:
    original = platform.get_attn_backend_cls.__func__

    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> str:
        if selected_backend is not member():
            return original(cls, selected_backend, attn_selector_config, *args, **kwargs)
        from vllm.platforms.interface import DeviceCapability

        reasons = selected_backend.get_class().validate_configuration(
            device_capability=DeviceCapability(0, 0), **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(
                f"attention backend fourier cannot run this model's layers ({', '.join(reasons)}): "
                "leave out --attention-backend fourier for this model."
            )
        return selected_backend.get_path()

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
