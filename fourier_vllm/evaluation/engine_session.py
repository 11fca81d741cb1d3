"""A vLLM engine behind one context that it holds in its prefix cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fourier_vllm._text import clip
from fourier_vllm.evaluation.tasks.base import Scores


@contextmanager
def running(settings: Mapping[str, Any]) -> Iterator[Any]:
    """A vLLM `LLM`, shut down afterwards so that the next one finds the memory free.

    Raises
    ------
    ValueError
        The engine does not start.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        llm = LLM(**settings)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"vLLM did not start ({reason(error)}): its log above has the cause."
        ) from None
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def reason(error: Exception) -> str:
    """What went wrong, on one line; pydantic says first only where."""
    from pydantic import ValidationError

    text = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
    lines = text.strip().splitlines() or [type(error).__name__]
    return clip(lines[0].removeprefix("Value error, ").rstrip("."), 240)


class EngineSession:
    """Questions to a context in one format, the engine's own.

    Parameters
    ----------
    llm : vllm.LLM
        With prefix caching.
    context : sequence of int
        Token ids; prefilled and cached here.
    sealed : int
        First tokens of the context that every question must read from the prefix cache.
    """

    def __init__(self, llm: Any, context: Sequence[int], sealed: int):
        self.llm, self.context, self.sealed = llm, list(context), sealed
        self._prefill()

    def _prefill(self) -> None:
        self._complete([], max_tokens=1)

    def _complete(self, prompt: Sequence[int], **sampling: Any) -> Any:
        """vLLM's output for greedy tokens behind the context and `prompt`."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **sampling)
        ids = {"prompt_token_ids": [*self.context, *prompt]}
        (output,) = self.llm.generate([ids], params, use_tqdm=False)
        return output

    def _ask(self, prompt: Sequence[int], **sampling: Any) -> Any:
        """The same for a question.

        Raises
        ------
        ValueError
            The context was computed again, so that nothing was read from sealed pages.
        """
        output = self._complete(prompt, **sampling)
        if output.num_cached_tokens < self.sealed:
            raise ValueError(
                f"vLLM cached {output.num_cached_tokens} tokens of a context of {len(self.context)}"
                f" and {self.sealed} are needed: choose a smaller --context."
            )
        return output

    def score(self, prompt: Sequence[int], target: Sequence[int]) -> Iterator[Scores]:
        """Log-probabilities of `target`; vLLM does not tell those of the whole vocabulary."""
        ids = [*prompt, *target]
        # Without the last vLLM computes the context anew, exactly in a chunk, as if it were a prompt.
        options = dict(max_tokens=1, prompt_logprobs=0, skip_reading_prefix_cache=False)
        output = self._ask(ids, **options)
        if output.num_cached_tokens >= len(self.context) + len(prompt):
            # An answer before went the same way: tokens that are read from the cache have no scores.
            self.llm.reset_prefix_cache()
            self._prefill()
            output = self._ask(ids, **options)
        places = output.prompt_logprobs[-len(target) :]
        logps = [place[token].logprob for place, token in zip(places, target, strict=True)]
        yield Scores(torch.tensor(logps), None)

    def generate(self, prompt: Sequence[int], count: int) -> list[list[int]]:
        """`count` greedy tokens, whether the model ends its text or not."""
        return [list(self._ask(prompt, max_tokens=count).outputs[0].token_ids)]
