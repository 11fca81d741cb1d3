"""Refusals reach the user as they are, not as one of pydantic's validation errors.

vLLM's configuration is checked while pydantic builds it, and pydantic wraps every ValueError: its text is
longer than ours and says last where pydantic is documented. Still a ValueError, without the wrapping.
"""

from __future__ import annotations

import sys
from functools import wraps
from typing import Any

from fourier_vllm._text import SUBJECT

ENGINE_ARGS = "vllm.engine.arg_utils"


def install() -> None:
    """Wrap `EngineArgs.create_engine_config` in a process that has it; a second call does nothing."""
    module = sys.modules.get(ENGINE_ARGS)
    if module is None or hasattr(module.EngineArgs.create_engine_config, "__wrapped__"):
        return
    original = module.EngineArgs.create_engine_config

    @wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from pydantic import ValidationError

        try:
            return original(self, *args, **kwargs)
        except ValidationError as error:
            refusal = _refusal(error)
            if refusal is None:
                raise
        raise refusal

    module.EngineArgs.create_engine_config = create_engine_config


def _refusal(error: Any) -> ValueError | None:
    causes = [found.get("ctx", {}).get("error") for found in error.errors()]
    return next((x for x in causes if str(x).startswith(SUBJECT)), None)
