"""What a batch accepts and what it refuses, before anything starts."""

from __future__ import annotations

import json

import pytest

from fourier_vllm.cli import main
from fourier_vllm.distributed.output import Output
from fourier_vllm.distributed.requests import scan

GOOD = {"id": 1, "prompt": "a"}


def write(path, *lines):
    path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))
    return path


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_batches_cover_every_request_once(tmp_path, size):
    pytest.importorskip("pyarrow")
    from fourier_vllm.distributed.requests import _read

    made = [{"id": i, "prompt": "é\u2028 " * i} for i in range(5)]
    path = write(tmp_path / "in", made[0], "\n", *made[1:3], "  \n", *made[3:])
    batches = scan(path, size)
    assert all(batch.rows <= size for batch in batches)
    tables = [table for batch in batches for table in _read(path, batch)]
    assert [len(table) for table in tables] == [batch.rows for batch in batches]
    assert [i for table in tables for i in table["id"].to_pylist()] == list("01234")
    assert [json.loads(r) for t in tables for r in t["request"].to_pylist()] == made


def test_last_line_without_a_newline(tmp_path):
    path = write(tmp_path / "in", GOOD, json.dumps({"id": 2, "prompt": "b"}))
    assert [(batch.offset, batch.rows) for batch in scan(path, 1)] == [(0, 1), (25, 1)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no request"),
        ([GOOD, "{\n"], "line 2 is not JSON"),
        (["\ufeff{}"], "line 1 is not JSON"),
        ([[1]], "line 1 is not a JSON object"),
        ([{"prompt": "a"}], 'no "id"'),
        ([{"id": True, "prompt": "a"}], 'no "id"'),
        ([{"id": 1.5, "prompt": "a"}], 'no "id"'),
        ([{"id": 1}], 'either "prompt" or "messages"'),
        ([{"id": 1, "prompt": "a", "messages": [{}]}], 'either "prompt" or "messages"'),
        ([{"id": 1, "prompt": 2}], '"prompt" is not text'),
        ([{"id": 1, "messages": []}], '"messages" is not a list'),
        ([{"id": 1, "messages": ["hello"]}], '"messages" is not a list'),
        ([GOOD, {"id": "1", "prompt": "b"}], "line 2: the id '1' was there before"),
    ],
)
def test_refuses_what_is_no_request(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        scan(write(tmp_path / "in", *lines), 8)


def test_refuses_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"--input .* is not a file"):
        scan(tmp_path / "in", 8)


def test_output_belongs_to_one_job(tmp_path):
    output = Output(tmp_path / "new" / "out")
    with output.open({"model": "a", "max_tokens": 1}):
        pass
    with output.open({"model": "a", "max_tokens": 1}):
        pass
    with (
        pytest.raises(ValueError, match="another max_tokens, model"),
        output.open({"model": "b", "max_tokens": 2}),
    ):
        pass


def test_output_refuses_a_foreign_folder_and_a_second_writer(tmp_path):
    write(tmp_path / "file", GOOD)
    with pytest.raises(ValueError, match="not made by batch"), Output(tmp_path).open({}):
        pass
    output = Output(tmp_path / "out")
    with (
        output.open({}),
        pytest.raises(ValueError, match="another batch is writing"),
        Output(output.folder).open({}),
    ):
        pass


@pytest.mark.parametrize(
    ("option", "value"),
    [("--replicas", "0"), ("--batch-size", "0"), ("--max-tokens", "-1"), ("--temperature", "-1")],
)
def test_refuses_impossible_options(capsys, tmp_path, option, value):
    path = write(tmp_path / "in", GOOD)
    arguments = ["batch", "model", "--input", str(path), "--output", str(tmp_path / "out")]
    assert main([*arguments, option, value]) == 1
    assert option in capsys.readouterr().err


def test_arguments_after_two_dashes_are_for_vllm_only(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["doctor", "--", "--max-model-len", "8"])
    assert "takes no arguments after --" in capsys.readouterr().err
