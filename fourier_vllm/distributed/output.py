"""The output folder of a batch: what belongs in it and what is already there.

DIR/job.json        model and options, so that a folder never mixes two of them
DIR/answers/*.json  JSON lines, a row a request; id and digest say which request a row answers
DIR/replaced/*.json rows taken out of answers/ and their files' torn lines; nothing reads them
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Standing:
    """What the folder holds for an input."""

    answered: set[str] = field(default_factory=set)  # ids
    errors: int = 0  # answers of these that hold an error
    others: int = 0  # rows for ids that are not in the input
    replaced: int = 0  # lines that were taken out


@dataclass(frozen=True)
class Output:
    """An output folder."""

    folder: Path

    @property
    def answers(self) -> Path:
        """Folder of the answers."""
        return self.folder / "answers"

    @property
    def replaced(self) -> Path:
        """Folder of what was an answer."""
        return self.folder / "replaced"

    @contextmanager
    def open(self, job: dict[str, Any]) -> Iterator[None]:
        """Hold the folder for `job`; it is created, or was made for the same.

        Raises
        ------
        ValueError
            When it holds something else, or another process holds it.
        """
        record = self.folder / "job.json"
        known = record.is_file() or not self.folder.exists()
        if not known and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ValueError(
                f"--output {self.folder} was not made by batch: choose a new folder or empty it."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        with record.open("a+b") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
            except OSError as error:
                raise ValueError(
                    f"--output {self.folder}: another batch is writing there; wait for it."
                ) from error
            handle.seek(0)
            before = _object(handle.read())
            if before != job:
                if self._holds_answers():
                    raise ValueError(self._other_job(before, job))
                handle.truncate(0)
                handle.write(json.dumps(job, indent=2).encode() + b"\n")
                handle.flush()
            yield

    def settle(self, digests: Mapping[str, str]) -> Standing:
        """Take out of answers/ what answers no request of the input as it is now.

        A row stands when its id is in the input with the digest of the row, and the first time
        only; so does a row whose id is not in the input. Everything else goes to replaced/: an
        answer to another text, a row without a digest (of an older version, which kept only ids),
        half a line that a killed run left.

        Parameters
        ----------
        digests
            Digest of every request by its id.
        """
        standing, seen = Standing(), set()
        for file in sorted(self.answers.glob("*.json")):
            kept, taken = [], []
            for line in file.read_bytes().splitlines(keepends=True):
                row = _object(line) or {}
                name, digest = row.get("id"), row.get("digest")
                if name is None or name in seen or digests.get(name, digest) != digest:
                    taken.append(line)
                    continue
                kept.append(line)
                seen.add(name)
                if name in digests:
                    standing.answered.add(name)
                    standing.errors += row.get("error") is not None
                else:
                    standing.others += 1
            if taken:
                standing.replaced += len(taken)
                self._replace(file, kept, taken)
        return standing

    def _replace(self, file: Path, kept: list[bytes], taken: list[bytes]) -> None:
        """Keep only some lines of a file; the others are safe before they leave it."""
        self.replaced.mkdir(exist_ok=True)
        with (self.replaced / file.name).open("ab") as stream:
            stream.writelines(line.rstrip(b"\n") + b"\n" for line in taken)
            stream.flush()
            os.fsync(stream.fileno())
        if not kept:
            file.unlink()
            return
        draft = file.with_name(f".{file.name}.tmp")
        draft.write_bytes(b"".join(kept))
        draft.replace(file)

    def _holds_answers(self) -> bool:
        return any(
            _object(line) is not None
            for file in self.answers.glob("*.json")
            for line in file.read_bytes().splitlines()
        )

    def _other_job(self, before: dict[str, Any] | None, job: dict[str, Any]) -> str:
        if before is None:
            return (
                f"--output {self.folder} holds answers and its job.json is damaged, so that nobody "
                "knows what made them: choose another folder."
            )
        names = sorted(before.keys() | job.keys())
        changed = [name for name in names if before.get(name) != job.get(name)]
        return (
            f"--output {self.folder} holds answers made with another "
            f"{', '.join(changed)} (see job.json there): choose another folder."
        )


def _object(text: bytes) -> dict[str, Any] | None:
    """The JSON object in a text, None where there is no whole one."""
    try:
        value = json.loads(text)
    except ValueError:  # of the encoding too
        return None
    return value if isinstance(value, dict) else None
