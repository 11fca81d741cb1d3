"""Fourier KV cache for vLLM: an attention backend called `fourier`."""

__version__ = "0.1.0"


def register() -> None:
    """Entry point of `vllm.general_plugins`; runs in every vLLM process, possibly several times.

    Only makes the name `fourier` selectable; everything else is imported when it is selected.
    """
    from fourier_vllm.engine.platform import install

    install()
