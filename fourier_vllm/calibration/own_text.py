"""Calibration text that needs no data: what the model writes by itself.

Damage is priced by the model's own predictions (`calibration.statistics`), so its own samples are the
text it prices them for; only where the model's text differs from its users' does a recipe lose by it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourier_vllm.calibration.text import MIN_PAGES

TEMPERATURE = 0.8
OWN_DOCUMENT_TOKENS = 2048
SEED = 0


@torch.inference_mode()
def write(
    model: Any,
    tokenizer: Any,
    tokens: int,
    page_size: int,
    longest: int = OWN_DOCUMENT_TOKENS,
    temperature: float = TEMPERATURE,
) -> list[Tensor]:
    """Sample documents of equal length, all at once, each from the beginning-of-text token.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal LM.
    tokens : int
        Tokens of all documents together, at least.
    page_size : int
        Eight pages are the least that says something about a model.
    longest : int
        Tokens of a document, at most.

    Returns
    -------
    list of Tensor [T], int64

    Raises
    ------
    ValueError
        `tokens` or the model's context are too short.
    """
    least = MIN_PAGES * page_size
    longest = min(longest, tokens)
    if longest < least:
        raise ValueError(
            f"--tokens and the model's context must be at least {least} tokens for pages of"
            f" {page_size}, found {longest}: choose more, or a smaller --page-size."
        )
    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id or 0
    first = torch.full((-(-tokens // longest), 1), start, device=model.device)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(SEED)
        written = model.generate(
            first,
            attention_mask=torch.ones_like(first),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=longest - 1,
            # An end of text does not end a document: the next one follows it.
            eos_token_id=-1,
            pad_token_id=start,
        )
    return list(written.cpu())
