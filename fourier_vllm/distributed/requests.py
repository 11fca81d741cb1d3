"""The input of a batch: a file of JSON lines, checked whole before an engine starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pyarrow
    from ray.data import Datasource


class Request(NamedTuple):
    """One line of the input."""

    id: str
    digest: str  # of what the engine reads
    offset: int  # bytes from the start of the file
    size: int  # bytes


@dataclass(frozen=True)
class Batch:
    """Requests that one engine answers together."""

    lines: tuple[tuple[int, int], ...]  # offset and size of each

    @property
    def rows(self) -> int:
        """How many requests there are."""
        return len(self.lines)

    @property
    def size(self) -> int:
        """Bytes of the input."""
        return sum(size for _, size in self.lines)


def scan(path: Path) -> list[Request]:
    """Every request of the file, checked.

    Raises
    ------
    ValueError
        At the first line that is no request, or whose id was there before.
    """
    if not path.is_file():
        raise ValueError(f"--input {path} is not a file: name a file of JSON lines.")
    found: dict[str, Request] = {}
    offset = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                identifier, content = _check(line, f"--input {path}, line {number}")
                if identifier in found:
                    raise ValueError(
                        f"--input {path}, line {number}: the id {identifier!r} was there before; "
                        "give every request its own."
                    )
                found[identifier] = Request(identifier, digest_of(content), offset, len(line))
            offset += len(line)
    if not found:
        raise ValueError(f"--input {path} holds no request: write one JSON object a line.")
    return list(found.values())


def cut(requests: Sequence[Request], batch_size: int) -> list[Batch]:
    """Batches of `batch_size` requests and of what is left over."""
    return [
        Batch(tuple((r.offset, r.size) for r in requests[first : first + batch_size]))
        for first in range(0, len(requests), batch_size)
    ]


def digest_of(content: str) -> str:
    """Names the `content` of a request in its answer: 32 hexadecimal digits."""
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def datasource(path: Path, batches: list[Batch]) -> Datasource:
    """A Ray Data source of rows {id, digest, request}, all text; one block a batch."""
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

    ids, contents = [], []
    with path.open("rb") as stream:
        for offset, size in batch.lines:
            stream.seek(offset)
            identifier, content = _check(stream.read(size), f"--input {path}, byte {offset}")
            ids.append(identifier)
            contents.append(content)
    # Of what is read now: a file that changed since the scan must not lend its digests.
    digests = [digest_of(content) for content in contents]
    # A request stays text: Arrow would make one type of all `messages`.
    yield pyarrow.table({"id": ids, "digest": digests, "request": contents})


def _check(line: bytes, where: str) -> tuple[str, str]:
    """Id of a request, and as JSON what the engine reads; refuses what no engine could answer."""
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
    content = {"prompt": prompt} if messages is None else {"messages": messages}
    return str(identifier), json.dumps(content)


_SHAPE = '{"id": ..., "prompt": "..."} or {"id": ..., "messages": [...]}'
