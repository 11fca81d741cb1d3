"""The output folder of a batch: what belongs in it and what is already there.

DIR/job.json       model and options, so that a folder never mixes two of them
DIR/answers/*.json JSON lines, a file a batch
DIR/done/*.parquet Ray Data's checkpoint: ids whose answers are whole
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Output:
    """An output folder."""

    folder: Path

    @property
    def answers(self) -> Path:
        """Folder of the answers."""
        return self.folder / "answers"

    @property
    def done(self) -> Path:
        """Folder of Ray Data's checkpoint."""
        return self.folder / "done"

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
        with record.open("a+", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
            except OSError as error:
                raise ValueError(
                    f"--output {self.folder}: another batch is writing there; wait for it."
                ) from error
            handle.seek(0)
            before = json.loads(handle.read() or "{}")
            if before != job:
                if self.finished():
                    names = sorted(before.keys() | job.keys())
                    changed = [name for name in names if before.get(name) != job.get(name)]
                    raise ValueError(
                        f"--output {self.folder} holds answers made with another "
                        f"{', '.join(changed)} (see job.json there): choose another folder."
                    )
                handle.truncate(0)
                handle.write(json.dumps(job, indent=2) + "\n")
                handle.flush()
            yield

    def finished(self) -> set[str]:
        """Ids with a whole answer; a file that a killed run left is not counted."""
        from pyarrow import parquet

        ids: set[str] = set()
        for file in self.done.glob("*.parquet"):
            if not file.name.endswith(".pending.parquet"):  # Ray removes these at the next start
                ids.update(parquet.read_table(file, columns=["id"])["id"].to_pylist())
        return ids

    def errors(self) -> int:
        """Answers that hold an error."""
        count = 0
        for file in self.answers.glob("*.json"):
            with file.open(encoding="utf-8") as lines:
                count += sum(json.loads(line)["error"] is not None for line in lines)
        return count
