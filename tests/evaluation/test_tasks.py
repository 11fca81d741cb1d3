"""Contexts that tasks make: needles inside the compressed part, questions behind, equal for a seed."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from fourier_vllm.evaluation.tasks import TASKS
from fourier_vllm.evaluation.tasks.agreement import GENERATED_TOKENS, Generation
from fourier_vllm.evaluation.tasks.base import Source
from fourier_vllm.evaluation.tasks.haystack import Question, names_all
from fourier_vllm.evaluation.text import documents

CONTEXT, MIDDLE = 2000, (100, 1700)
NEEDLES = {
    "needle": (1, r"One of the special magic numbers for (\w+) is: (\d{7})\."),
    "multikey": (6, r"One of the special magic numbers for (\w+) is: (\d{7})\."),
    "multivalue": (4, r"One of the special magic numbers for (\w+) is: (\d{7})\."),
    "vartrack": (5, r"VAR ([A-Z]{5}) = ((?:VAR [A-Z]{5})|\d{5})\."),
}


def characters(text: str) -> list[int]:
    return [min(ord(c), 127) for c in text]


def words(text: str) -> list[int]:
    """Tokens of up to four characters that end at a blank, as numbers of one length."""
    parts = re.findall(r"\s|\S{1,4}", "".join(chr(min(ord(c), 127)) for c in text))
    return [int.from_bytes(part.encode(), "big") for part in parts]


def spell(ids: list[int]) -> str:
    return "".join(i.to_bytes(4, "big").strip(b"\0").decode() for i in ids)


def source_of(
    seed: str = "0", encode: Callable[[str], list[int]] = characters, context: int = CONTEXT
) -> Source:
    (document,) = documents(1, 20_000)
    return Source(document, encode, spell, [], context, MIDDLE, 6, seed)


@pytest.mark.parametrize("encode", [characters, words])
@pytest.mark.parametrize("seed", ["0", "1", "2"])
@pytest.mark.parametrize("name", NEEDLES)
def test_needles_lie_in_the_middle(name: str, seed: str, encode) -> None:
    count, pattern = NEEDLES[name]
    ids, probes = TASKS[name](source_of(seed, encode))
    assert CONTEXT - 100 <= len(ids) <= CONTEXT
    inside = re.findall(pattern, spell(ids[MIDDLE[0] : MIDDLE[1]]))
    assert len(inside) == count
    assert len(re.findall(pattern, spell(ids))) == count
    for probe in probes:
        # The question names the key, the answer is what the needle says.
        prompt, target = spell(probe.prompt), spell(probe.target)
        assert target == probe.answer
        assert prompt.startswith("\n\nQuestion: ")
        assert prompt.endswith(": ")
        assert not re.search(r"\d{7}", prompt)
        assert probe.share(target) == 1
        assert probe.share("nothing") == 0


def test_needles_are_spread() -> None:
    text = spell(TASKS["multikey"](source_of())[0])
    depths = [m.start() / len(text) for m in re.finditer("special magic", text)]
    for i, depth in enumerate(depths):
        low, high = (MIDDLE[0] + (MIDDLE[1] - MIDDLE[0]) * j / 6 for j in (i, i + 1))
        assert low - 150 <= depth * CONTEXT <= high + 150


def test_every_key_is_asked() -> None:
    ids, probes = TASKS["multikey"](source_of())
    text = spell(ids)
    asked = re.findall(r"magic number for (\w+) ", "".join(spell(p.prompt) for p in probes))
    assert len(set(asked)) == 6
    for word, probe in zip(asked, probes, strict=True):
        assert f"numbers for {word} is: {probe.answer}." in text


def test_the_chain_leads_from_the_value_to_every_variable() -> None:
    ids, (probe,) = TASKS["vartrack"](source_of())
    found = re.findall(NEEDLES["vartrack"][1], spell(ids))
    (value,) = re.findall(r"the value (\d{5}) in the text", spell(probe.prompt))
    assert [of for _, of in found] == [value, *(f"VAR {name}" for name, _ in found[:-1])]
    assert probe.answer == ", ".join(name for name, _ in found)


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_decides_everything(name: str) -> None:
    first, again, other = (TASKS[name](source_of(seed)) for seed in ("7", "7", "8"))
    assert first[0] == again[0]
    assert [vars(p).get("answer") for p in first[1]] == [vars(p).get("answer") for p in again[1]]
    plain = name in ("nll", "agreement")
    assert (first[0] == other[0]) == plain


def test_plain_tasks_share_their_context() -> None:
    assert TASKS["nll"](source_of())[0] == TASKS["agreement"](source_of())[0]


def test_first_token() -> None:
    source = Source(**(vars(source_of()) | {"first": [2]}))
    for name in TASKS:
        ids = TASKS[name](source)[0]
        assert ids[0] == 2
        assert ids.count(2) == 1


def test_shares() -> None:
    share = names_all(["1234567", "7654321"])
    assert share("1234567, and 7654321") == 1
    assert share("7654321 7654320") == 0.5
    assert share("") == 0


def test_answers_that_merge_with_the_prompt() -> None:
    """A tokenizer that joins the blank with what follows: the answer is encoded on its own."""

    def encode(text: str) -> list[int]:
        return [hash(part) for part in re.findall(r" ?\S+| ", text)]

    source = SimpleNamespace(encode=encode, decode=spell)
    question = Question.make(source, "is: ", "12", lambda text: 1.0)
    assert question.prompt == encode("is: ")
    assert question.target == encode("12")


def test_agreement_counts() -> None:
    exact = list(range(GENERATED_TOKENS))
    other = exact.copy()
    other[10], other[20] = -1, -1
    session = SimpleNamespace(generate=lambda prompt, count: [exact, other])
    rows = Generation([1]).measure(session)
    assert rows[0] == {"same": 1.0, "prefix": 256.0}
    assert rows[1] == {"same": 254 / 256, "prefix": 10.0}
