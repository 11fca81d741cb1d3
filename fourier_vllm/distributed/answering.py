"""The actor of a batch: one engine that answers blocks of requests."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow


class Answering:
    """Turns {id, digest, request} into one answer a request, whatever the request.

    Parameters
    ----------
    engine
        Keyword arguments of `vllm.LLM`.
    sampling
        Keyword arguments of `vllm.SamplingParams`.
    """

    def __init__(self, engine: dict[str, Any], sampling: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(**engine)
        self.sampling = sampling

    def __call__(self, block: pyarrow.Table) -> pyarrow.Table:
        """Answers in the order of the requests, with the columns of `columns`."""
        import pyarrow

        rows = block.to_pylist()
        accepted = []
        for row in rows:
            error = self._enqueue(json.loads(row.pop("request")))
            if error is None:
                accepted.append(row)
            else:
                row |= {"error": error, "finish_reason": "error"}
        # one by one in the queue, so vLLM gives them back in this order
        outputs = self.llm.wait_for_completion(use_tqdm=False)
        for row, output in zip(accepted, outputs, strict=True):
            (completion,) = output.outputs
            row |= {
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "prompt_tokens": len(output.prompt_token_ids),
                "output_tokens": len(completion.token_ids),
            }
        schema = columns()
        empty = {"prompt_tokens": 0, "output_tokens": 0}
        return pyarrow.Table.from_pylist([empty | row for row in rows], schema=schema)

    def _enqueue(self, request: dict[str, Any]) -> str | None:
        """Give a request to the engine; the reason when it cannot be answered."""
        from jinja2 import TemplateError
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError

        params = SamplingParams(**self.sampling)
        try:
            if "messages" in request:
                self.llm.enqueue_chat([request["messages"]], params, use_tqdm=False)
            else:
                self.llm.enqueue([request["prompt"]], params, use_tqdm=False)
        # the request's fault; an engine that died raises another kind and ends the run
        except (VLLMClientError, ValueError, TypeError, KeyError, TemplateError) as error:
            return str(error)
        return None


def columns() -> pyarrow.Schema:
    """Columns of an answer; `digest` says to which text, `error` why there is no `text`."""
    import pyarrow

    text, count = pyarrow.string(), pyarrow.int64()
    return pyarrow.schema(
        {
            "id": text,
            "digest": text,
            "text": text,
            "finish_reason": text,
            "error": text,
            "prompt_tokens": count,
            "output_tokens": count,
        }
    )
