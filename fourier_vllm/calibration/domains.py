"""Calibration text of several domains that ships with the package.

`texts/PROVENANCE.md` says what the files are. A recipe calibrated on one kind of text loses on others;
documents drawn evenly from all of these cost it less there.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from importlib.resources import files
from typing import Any

from torch import Tensor

from fourier_vllm.calibration.text import check_length, encode, first_token, spread

DOMAINS = ("dialogue", "code", "prose", "languages", "manual", "tables")
TODAY = datetime(2026, 11, 28)  # for templates that write the date: text must not change by the day


def read_domains(tokenizer: Any) -> dict[str, str]:
    """Text of each shipped domain by its name, in the order of `DOMAINS`.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Its chat template writes the conversations of `dialogue`, one after another. Where it has none,
        or its template refuses a conversation, that conversation is lines of "User: " and "Assistant: ".

    Returns
    -------
    dict of str to str
        Without the beginning-of-text token that the tokenizer would add by itself.
    """
    folder = files("fourier_vllm.calibration") / "texts"
    texts = {}
    for name in DOMAINS:
        if name == "dialogue":
            conversations = json.loads((folder / f"{name}.json").read_text("utf-8"))
            texts[name] = "".join(render(tokenizer, one) for one in conversations)
        else:
            texts[name] = (folder / f"{name}.txt").read_text("utf-8")
    return texts


def texts_digest() -> str:
    """Tells versions of the shipped texts apart."""
    digest = hashlib.sha256()
    for file in sorted((files("fourier_vllm.calibration") / "texts").iterdir(), key=str):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def render(tokenizer: Any, conversation: list[dict[str, str]]) -> str:
    """A conversation as the model reads it; plain lines where its template cannot write it."""
    dated = "strftime_now" in str(getattr(tokenizer, "chat_template", None))
    options = {"strftime_now": TODAY.strftime} if dated else {}
    try:
        text: str = tokenizer.apply_chat_template(conversation, tokenize=False, **options)
    except Exception:  # a template is a program: what it raises is its own choice
        lines = (f"{turn['role'].capitalize()}: {turn['content']}\n" for turn in conversation)
        return "".join(lines) + "\n"
    return text.removeprefix(tokenizer.bos_token) if first_token(tokenizer) else text


def mixed_documents(tokenizer: Any, tokens: int, page_size: int, longest: int) -> list[Tensor]:
    """Documents of equal length, each of one shipped domain, domains in turn.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
    tokens : int
        Tokens of all documents together; fewer where the texts are shorter, for every domain gives as
        many documents as the others, or one less. Where `tokens` are few, documents are shorter than
        `longest`, and as short as eight pages, so that each domain gives one.
    page_size : int
        Eight pages are the least that says something about a model.
    longest : int
        Tokens of a document, at most.

    Returns
    -------
    list of Tensor [T], int64
        Each starts with the model's beginning-of-text token if its texts do.

    Raises
    ------
    ValueError
        `tokens`, the model's context or the texts are too short.
    """
    least = check_length(tokens, longest, page_size)
    texts = [encode(tokenizer, text) for text in read_domains(tokenizer).values()]
    shortest = min(map(len, texts))
    if shortest < least:
        raise ValueError(
            f"shipped texts have {shortest} tokens a domain, and pages of {page_size} need {least}:"
            " choose a smaller --page-size, or give a text."
        )
    count = max(-(-tokens // longest), min(len(texts), tokens // least))
    size = min(tokens // count, shortest)
    count = min(count, len(texts) * (shortest // size))
    start = first_token(tokenizer)
    documents = []
    for i, ids in enumerate(texts[:count]):
        of_domain = len(range(i, count, len(texts)))
        documents.append(spread(ids, start, of_domain * size, size))
    return [documents[i % len(texts)][i // len(texts)] for i in range(count)]
