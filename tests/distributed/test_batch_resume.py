"""A batch that is started again: what was answered stands, and only that."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourier_vllm.distributed import batch, requests
from fourier_vllm.distributed.output import Output

pytest.importorskip("pyarrow")

INPUTS = st.dictionaries(st.sampled_from("abcde"), st.sampled_from("xyz"), min_size=1).flatmap(
    lambda made: st.permutations(list(made.items()))
)
FAULTS = ["none", "half a line", "no digest", "twice", "garbage"]


class Engine:
    """Stands for Ray and its engines: answers the first `stop` requests that it is given."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.stop = 1 << 30

    def __call__(self, options, engine, source, batches, output) -> None:
        for part in batches:
            (table,) = requests._read(source, part)
            rows = table.to_pylist()[: self.stop - len(self.asked)]
            self.asked += [row["id"] for row in rows]
            if rows:
                write(output.answers, rows)


def write(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(exist_ok=True)
    lines = [
        {"id": row["id"], "digest": row["digest"], "text": answer(row["request"]), "error": None}
        for row in rows
    ]
    file = folder / f"{uuid4().hex}.json"  # new in every run, as Ray's are
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def answer(request: str) -> str:
    return "answer to " + json.loads(request)["prompt"]


def read(folder: Path) -> list[dict]:
    lines = [x for file in folder.glob("*.json") for x in file.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def damage(output: Output, fault: str, name: str) -> list[str]:
    """What a kill, a copy, an older version or a bad disk leaves; ids whose answer it costs."""
    file = next(
        file for file in output.answers.glob("*.json") if f'"id": "{name}"' in file.read_text()
    )
    lines = file.read_text().splitlines(keepends=True)
    index = next(i for i, line in enumerate(lines) if json.loads(line)["id"] == name)
    lost = [name]
    if fault == "half a line":  # and what would follow it
        lost = [json.loads(line)["id"] for line in lines[index:]]
        lines[index:] = [lines[index][:-5]]
    elif fault == "no digest":
        row = json.loads(lines[index])
        lines[index] = json.dumps({"id": row["id"], "text": "of version 0.1", "error": None}) + "\n"
    elif fault == "twice":
        lines.append(lines[index])
        lost = []
    elif fault == "garbage":
        lines[index] = "\x00" * 8 + "\n"
    else:
        lost = []
    file.write_text("".join(lines))
    return lost


@pytest.fixture(scope="module")
def engine():
    with pytest.MonkeyPatch.context() as patch:
        engine = Engine()
        patch.setattr(batch, "_answer", engine)
        patch.setattr(batch, "_engine", lambda options: {})
        patch.setattr(batch.cluster, "require", lambda: None)
        yield engine


def start(engine: Engine, folder: Path, made: list[tuple[str, str]], size: int, stop: int) -> int:
    engine.asked, engine.stop = [], stop
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps({"id": i, "prompt": x}) + "\n" for i, x in made))
    options = batch.Options(model="m", input=source, output=folder / "out", batch_size=size)
    return batch.run(options)


@settings(max_examples=120, deadline=None)
@given(data=st.data(), first=INPUTS, second=INPUTS)
def test_every_request_of_the_second_input_is_answered_once(data, engine, first, second):
    with TemporaryDirectory() as name:
        folder = Path(name)
        output = Output(folder / "out")
        stop = data.draw(st.integers(0, len(first)), "answered before the kill")
        size = data.draw(st.integers(1, 3), "batch size")
        assert start(engine, folder, first, size, stop) == int(stop < len(first))
        done = dict(first[:stop])
        if done:
            fault = data.draw(st.sampled_from(FAULTS), "fault")
            for lost in damage(output, fault, data.draw(st.sampled_from(sorted(done)), "where")):
                del done[lost]

        # a second kill first: nothing is answered, and the exit code says so
        missing = [i for i, text in second if done.get(i) != text]
        assert start(engine, folder, second, size, 0) == int(bool(missing))
        assert start(engine, folder, second, size, 1 << 30) == 0
        assert engine.asked == missing
        rows = read(output.answers)
        assert set(Counter(row["id"] for row in rows).values()) == {1}
        texts = {row["id"]: row["text"] for row in rows}
        assert {i: texts[i] for i, _ in second} == {i: f"answer to {text}" for i, text in second}
        assert done.keys() - dict(second).keys() <= texts.keys()  # answers to other inputs stay
        assert start(engine, folder, second, size, 1 << 30) == 0
        assert engine.asked == []


def test_an_answer_of_an_older_version_is_kept_aside(engine, tmp_path, capsys):
    """Its row has only an id: nobody knows to which text."""
    assert start(engine, tmp_path, [("a", "x"), ("b", "y")], 2, 1 << 30) == 0
    output = Output(tmp_path / "out")
    damage(output, "no digest", "a")
    capsys.readouterr()
    assert start(engine, tmp_path, [("a", "x"), ("b", "y")], 2, 1 << 30) == 0
    assert engine.asked == ["a"]
    assert f"1 lines went to {output.replaced}" in capsys.readouterr().out
    assert [row["text"] for row in read(output.replaced)] == ["of version 0.1"]


def test_unanswered_requests_are_exit_code_1(engine, tmp_path, capsys):
    assert start(engine, tmp_path, [("a", "x"), ("b", "y")], 1, 1) == 1
    assert "1 of 2 requests have no answer" in capsys.readouterr().err
