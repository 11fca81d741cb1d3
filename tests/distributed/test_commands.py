"""What a batch accepts and what it refuses, before anything starts."""

from __future__ import annotations

import json

import pytest

from fourier_vllm.cli import main
from fourier_vllm.distributed.cluster import Share, reason, share
from fourier_vllm.distributed.output import Output
from fourier_vllm.distributed.requests import cut, scan

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
    found = scan(path)
    batches = cut(found, size)
    assert all(batch.rows <= size for batch in batches)
    tables = [table for batch in batches for table in _read(path, batch)]
    assert [len(table) for table in tables] == [batch.rows for batch in batches]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["id"] for row in rows] == list("01234")
    assert [json.loads(row["request"]) for row in rows] == [{"prompt": x["prompt"]} for x in made]
    assert [row["digest"] for row in rows] == [request.digest for request in found]


def test_last_line_without_a_newline(tmp_path):
    path = write(tmp_path / "in", GOOD, json.dumps({"id": 2, "prompt": "b"}))
    assert [batch.lines for batch in cut(scan(path), 1)] == [((0, 25),), ((25, 24),)]


def test_a_digest_is_of_what_the_engine_reads(tmp_path):
    """Neither the id, nor a field that nobody reads, nor how the JSON is spelled."""
    chat = [{"role": "user", "content": "é"}]
    lines = [
        {"id": 1, "prompt": "é"},
        '{"prompt" : "\\u00e9", "messages": null, "id": "x", "topic": 3}\n',
        {"id": 2, "prompt": "e"},
        {"id": 3, "messages": chat},
        {"id": 4, "messages": chat, "prompt": None},
        {"id": 5, "messages": chat * 2},
    ]
    a, same, other, chat_a, chat_same, longer = (
        request.digest for request in scan(write(tmp_path / "in", *lines))
    )
    assert a == same
    assert chat_a == chat_same
    assert len({a, other, chat_a, longer}) == 4


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
        scan(write(tmp_path / "in", *lines))


def test_refuses_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"--input .* is not a file"):
        scan(tmp_path / "in")


def test_output_belongs_to_one_job_once_it_holds_answers(tmp_path):
    output = Output(tmp_path / "new" / "out")
    for job in ({"model": "a", "max_tokens": 1}, {"model": "b", "max_tokens": 2}):
        with output.open(job):
            assert output.settle({"1": "d"}).answered == set()
    output.answers.mkdir()
    (output.answers / "x.json").write_text(
        '{"id": "1", "digest": "d", "text": "t", "error": null}\n'
    )
    with output.open({"model": "b", "max_tokens": 2}):
        assert output.settle({"1": "d"}).answered == {"1"}
    with pytest.raises(ValueError, match="another max_tokens"), output.open({"model": "b"}):
        pass
    (output.folder / "job.json").write_bytes(b"\x00\x00")
    with (
        pytest.raises(ValueError, match=r"job\.json is damaged.*choose another folder"),
        output.open({}),
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


def test_options_of_vllm():
    from fourier_vllm.distributed.vllm_options import devices, parse

    plain = parse(["--max-model-len", "2k", "--enforce-eager"], "batch")
    assert plain == {"attention_backend": "fourier", "max_model_len": 2000, "enforce_eager": True}
    assert devices(plain) == 1
    stock = parse(["--attention-backend", "CPU_ATTN", "-tp", "2", "-pp", "3"], "batch")
    assert stock["attention_backend"] == "CPU_ATTN"
    assert devices(stock) == 6
    with pytest.raises(ValueError, match="second model"):
        parse(["--model", "other"], "deploy")


def test_a_replica_stays_on_one_node(capsys, tmp_path):
    pytest.importorskip("ray")
    path = write(tmp_path / "in", GOOD)
    arguments = ["batch", "model", "--input", str(path), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--", "--distributed-executor-backend", "ray"]) == 1
    assert "leave it out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_share_of_a_cluster(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 32.0, "GPU": 4.0})
    assert share(2, 2) == Share(num_cpus=0, num_gpus=2)
    with pytest.raises(ValueError, match="3 replicas of 2 GPUs need 6, the Ray cluster has 4"):
        share(3, 2)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 32.0})
    assert share(4, 1) == Share(num_cpus=7, num_gpus=0)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    assert share(2, 1) == Share(num_cpus=0, num_gpus=0)


@pytest.mark.parametrize(
    "text",
    [
        "Traceback\n  x\nValueError: the cause",
        "Traceback\npkg.Error: 1 error for Config\n  Value error, the cause [type=v, input={}]\n  See",
        "Traceback\nvllm.SomeError: the cause\nray.exceptions.UserCodeException: UDF failed",
        "the cause",
    ],
)
def test_reason_of_a_failure_elsewhere(text):
    assert reason(text) == "the cause"


def test_arguments_after_two_dashes_are_for_vllm_only(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["doctor", "--", "--max-model-len", "8"])
    assert "takes no arguments after --" in capsys.readouterr().err
