"""Shipped calibration texts are what PROVENANCE.md says, and documents are spread over them."""

import hashlib
import json
import re
from datetime import datetime
from types import SimpleNamespace

import pytest
import transformers

from fourier_vllm.calibration import domains
from fourier_vllm.calibration.domains import DOMAINS, mixed_documents, read_domains, render


class Letters:
    """A tokenizer of one token a character, with or without a chat template."""

    bos_token_id = 1
    bos_token = "<s>"

    def __init__(self, template=None, bos=True):
        self.template, self.bos = template, bos

    def __call__(self, text, add_special_tokens=True, **_):
        ids = [*([1] * (self.bos and add_special_tokens)), *map(ord, text)]
        return SimpleNamespace(input_ids=ids)

    def apply_chat_template(self, conversation, tokenize):
        assert not tokenize
        if self.template is None:
            raise ValueError("no chat template")
        return self.template(conversation)


def brackets(conversation):
    if conversation[0]["role"] == "system":
        raise RuntimeError("system role not supported")
    return "<s>" + "".join(f"[{turn['role']}]{turn['content']}" for turn in conversation)


@pytest.fixture(scope="module")
def folder(root):
    return root / "fourier_vllm/calibration/texts"


def test_files_are_those_of_the_provenance(folder):
    listed = dict(
        re.findall(
            r"^\| `(\S+)` .* `([0-9a-f]{64})` \|$",
            (folder / "PROVENANCE.md").read_text("utf-8"),
            re.M,
        )
    )
    found = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".md"}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in found.items()} == listed
    assert {name.partition(".")[0] for name in found} == set(DOMAINS)
    assert sum(map(len, found.values())) < 1 << 20
    for data in found.values():
        assert "\r" not in data.decode("utf-8")


def test_conversations_alternate(folder):
    """Templates of many models refuse others."""
    for conversation in json.loads((folder / "dialogue.json").read_text("utf-8")):
        roles = [turn["role"] for turn in conversation]
        roles = roles[roles[0] == "system" :]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(set(turn) == {"role", "content"} and turn["content"] for turn in conversation)


def test_dialogue_without_a_template_is_plain_lines():
    texts = read_domains(Letters())
    assert tuple(texts) == DOMAINS
    assert all(texts.values())
    assert texts["dialogue"].startswith("User: Hi! I'm planning")
    assert texts["dialogue"].count("\nAssistant: ") > 30
    assert texts["code"] == read_domains(Letters(brackets))["code"]


def test_dialogue_is_written_by_the_template():
    text = read_domains(Letters(brackets))["dialogue"]
    assert text.startswith("[user]Hi! I'm planning")
    assert "<s>" not in text
    assert text.count("System: ") == 1  # the template refuses this conversation alone
    assert text.count("Assistant: ") < text.count("[assistant]")
    kept = read_domains(Letters(brackets, bos=False))["dialogue"]
    assert kept.startswith("<s>[user]")  # part of the format, as the tokenizer adds none


def test_no_template_writes_today(monkeypatch):
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_tokenizer())
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0]['content'] }}"
    turn = [{"role": "user", "content": "hello"}]
    assert render(tokenizer, turn) == "28 Nov 2026: hello"
    monkeypatch.setattr(domains, "TODAY", datetime(2001, 2, 3))
    assert render(tokenizer, turn) == "03 Feb 2001: hello"


def bytes_tokenizer():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))


@pytest.mark.parametrize(
    ("tokens", "longest", "count", "size"),
    [
        (16384, 4096, 6, 2730),  # shorter than the longest, one of each domain
        (49152, 4096, 12, 4096),
        (20480, 2048, 10, 2048),  # the first four domains twice
        (1000, 4096, 3, 333),  # eight pages of 32 at least
        (300, 300, 1, 300),
    ],
)
def test_documents_take_domains_in_turn(tokens, longest, count, size):
    tokenizer = Letters(brackets)
    texts = list(read_domains(tokenizer).values())
    found = mixed_documents(tokenizer, tokens, 32, longest)
    assert [len(x) for x in found] == [size] * count
    assert len({tuple(x.tolist()) for x in found}) == count
    for i, ids in enumerate(found):
        assert ids[0] == 1
        assert "".join(map(chr, ids[1:])) in texts[i % len(texts)]


def test_every_domain_gives_as_many_as_the_shortest_has():
    tokenizer = Letters(bos=False)
    shortest = min(map(len, read_domains(tokenizer).values()))
    found = mixed_documents(tokenizer, 10**6, 32, 4096)
    assert len(found) == 6 * (shortest // 4096)
    found = mixed_documents(tokenizer, 10**6, 32, 10**5)
    assert [len(x) for x in found] == [shortest] * 6


@pytest.mark.parametrize(
    ("tokens", "page_size", "longest", "message"),
    [
        (100, 32, 4096, "--tokens must be at least 256 tokens"),
        (1000, 32, 100, "the model's context must be at least 256 tokens"),
        (
            10**6,
            4096,
            10**6,
            r"shipped texts have \d+ tokens a domain, and pages of 4096 need 32768",
        ),
    ],
)
def test_too_short(tokens, page_size, longest, message):
    with pytest.raises(ValueError, match=message):
        mixed_documents(Letters(), tokens, page_size, longest)
