"""Calibration text that needs no data: what the model writes by itself.

Damage is priced by the model's own predictions (`calibration.statistics`), so its own samples are the
text it prices them for; only where the model's text differs from its users' does a recipe lose by it.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fourier_vllm.calibration.arrays import save_arrays
from fourier_vllm.calibration.text import check_length

TEMPERATURE = 0.6  # least KL on tuning text, of 0.4 to 1.0
OWN_DOCUMENT_TOKENS = 2048
SEED = 0
NAME = f"written by the model itself, temperature {TEMPERATURE}"


@torch.inference_mode()
def write(
    model: Any, tokenizer: Any, tokens: int, page_size: int, longest: int = OWN_DOCUMENT_TOKENS
) -> list[Tensor]:
    """Sample documents of equal length, all at once, each from the beginning-of-text token.

    An end of text does not end a document: the next one follows it. Nothing else of the model's
    generation config applies either, and no random state outside is read or changed.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal LM.
    tokenizer : transformers.PreTrainedTokenizerBase
        Names the first token: where it knows no beginning of text, the end of one.
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
    check_length(tokens, longest, page_size)
    longest = min(longest, tokens)
    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id or 0
    generator = torch.Generator(model.device).manual_seed(SEED)
    ids = [torch.full((-(-tokens // longest), 1), start, device=model.device)]
    cache = None
    for _ in tqdm(range(longest - 1), desc="write", unit="token", disable=None):
        output = model(input_ids=ids[-1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        probabilities = (output.logits[:, -1].float() / TEMPERATURE).softmax(-1)
        ids.append(torch.multinomial(probabilities, 1, generator=generator))
    return list(torch.cat(ids, 1).cpu())


def write_once(path: Path, *parts: object, write: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The documents kept in `path` if they are of the same `parts`, else written and kept there.

    A second sampling may draw other tokens where arithmetic is not the same to the last bit, and sums
    over some of the first documents would be lost.

    Raises
    ------
    ValueError
        The file cannot be written; whatever `write` raises.
    """
    key = hashlib.sha256(json.dumps([NAME, SEED, *map(str, parts)]).encode()).hexdigest()
    try:
        with np.load(path, allow_pickle=False) as archive:
            if str(archive["key"]) == key:
                return list(torch.from_numpy(archive["ids"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not there, or damaged: write anew
    documents = write()
    save_arrays(path, "text", {"key": np.array(key), "ids": torch.stack(documents).numpy()})
    return documents
