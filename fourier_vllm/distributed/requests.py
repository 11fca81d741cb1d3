"""The input of a batch: a file of JSON lines, checked whole before an engine starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow
    from ray.data import Datasource


@dataclass(frozen=True)
class Batch:
    """Lines of the input that one engine answers together."""

    offset: int  # bytes from the start of the file
    size: int  # bytes
    rows: int  # lines with a request


def scan(path: Path, batch_size: int) -> list[Batch]:
    """Cut the file into batches; every request is checked.

    Raises
    ------
    ValueError
        At the first line that is no request, or whose id was there before.
    """
    if not path.is_file():
        raise ValueError(f"--input {path} is not a file: name a file of JSON lines.")
    seen: set[str] = set()
    batches: list[Batch] = []
    offset = start = rows = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            offset += len(line)
            if line.strip():
                identifier = _check(line, f"--input {path}, line {number}")
                if identifier in seen:
                    raise ValueError(
                        f"--input {path}, line {number}: the id {identifier!r} was there before; "
                        "give every request its own."
                    )
                seen.add(identifier)
                rows += 1
            if rows == batch_size:
                batches.append(Batch(start, offset - start, rows))
                start, rows = offset, 0
    if rows:
        batches.append(Batch(start, offset - start, rows))
    if not batches:
        raise ValueError(f"--input {path} holds no request: write one JSON object a line.")
    return batches


def datasource(path: Path, batches: list[Batch]) -> Datasource:
    """A Ray Data source of rows {id, request}, both text; one block a batch."""
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    class Requests(Datasource):
        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
        ) -> list[ReadTask]:
            return [
                ReadTask(
                    _reader(path, batch),
                    BlockMetadata(batch.rows, batch.size, [str(path)], None),
                    per_task_row_limit=per_task_row_limit,
                )
                for batch in batches
            ]

        def estimate_inmemory_data_size(self) -> int:
            return sum(batch.size for batch in batches)

    return Requests()


def _reader(path: Path, batch: Batch) -> Callable[[], Iterator[pyarrow.Table]]:
    return partial(_read, path, batch)


def _read(path: Path, batch: Batch) -> Iterator[pyarrow.Table]:
    import pyarrow

    with path.open("rb") as stream:
        stream.seek(batch.offset)
        text = stream.read(batch.size).decode()
    lines = [line for line in text.split("\n") if line.strip()]
    ids = [str(json.loads(line)["id"]) for line in lines]
    # the line stays text: Arrow would make one type of all `messages`
    yield pyarrow.table({"id": ids, "request": lines})


def _check(line: bytes, where: str) -> str:
    """The id of a request; refuses what no engine could answer."""
    try:
        request = json.loads(line.decode())
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}): write one object a line.") from error
    if not isinstance(request, dict):
        raise ValueError(f"{where} is not a JSON object: write {_SHAPE}.")
    identifier = request.get("id")
    if isinstance(identifier, bool) or not isinstance(identifier, (str, int)):
        raise ValueError(f'{where} has no "id" of text or a whole number: write {_SHAPE}.')
    prompt, messages = request.get("prompt"), request.get("messages")
    if (prompt is None) == (messages is None):
        raise ValueError(f'{where} needs either "prompt" or "messages": write {_SHAPE}.')
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f'{where}: "prompt" is not text: write {_SHAPE}.')
    if messages is not None and not (
        isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
    ):
        raise ValueError(f'{where}: "messages" is not a list of messages: write {_SHAPE}.')
    return str(identifier)


_SHAPE = '{"id": ..., "prompt": "..."} or {"id": ..., "messages": [...]}'
