"""Calibration text out of a Hugging Face dataset: streamed, and only as much as is needed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fourier_vllm._text import clip, show

HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?::([\w.-]+))?")
DEFAULT_COLUMN = "text"
SEPARATOR = "\n\n"


class Dataset(NamedTuple):
    """Where a dataset is.

    Attributes
    ----------
    source : str
        A folder, or an id on the Hub.
    config : str or None
        Which of its configurations; None is the default one.
    """

    source: str
    config: str | None

    @property
    def name(self) -> str:
        """For provenance: without the folders above it."""
        folder = Path(self.source).expanduser()
        name = folder.resolve().name if folder.exists() else self.source
        return f"{name}:{self.config}" if self.config else name


def find_dataset(text: Path) -> Dataset | None:
    """What `--text` names, if that is a dataset: FOLDER or OWNER/NAME, and :CONFIG if wanted."""
    if text.expanduser().is_dir():
        return Dataset(str(text), None)
    folder, _, config = str(text).rpartition(":")
    if folder and Path(folder).expanduser().is_dir():
        return Dataset(folder, config)
    hub = HUB_ID.fullmatch(str(text))
    # A wrong name in a folder that is here means a file.
    return None if hub is None or text.exists() or text.parent.exists() else Dataset(*hub.groups())


def read_dataset(dataset: Dataset, column: str, chars: int) -> str:
    """The first rows of a column, joined by blank lines.

    Parameters
    ----------
    column : str
        Holds strings; rows without one are passed over.
    chars : int
        Characters to return, at most. What lies behind them is not read.

    Raises
    ------
    ValueError
        The dataset cannot be read or has no such column of text, or `datasets` is not installed.
    """
    texts: list[str] = []
    length = 0
    for row in _rows(dataset):
        if column not in row:
            raise ValueError(
                f"dataset {show(dataset.name, 120)} has no column {show(column)}: give one of"
                f" {clip(', '.join(row), 160)} as --text-column."
            )
        value = row[column]
        if not isinstance(value, str | None):
            raise ValueError(
                f"column {show(column)} of dataset {show(dataset.name, 120)} holds {show(value)}, not"
                " text: give another --text-column."
            )
        texts.append(value or "")
        length += len(texts[-1]) + len(SEPARATOR)  # empty rows count too: an end is certain
        if length >= chars:
            break
    return SEPARATOR.join(filter(None, texts))[:chars]


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Rows of the split `train`, or of the first one where there is none of that name."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            "--text names a dataset, which needs the package datasets: install it with `pip install"
            " 'fourier-vllm[data]'`, or give a file."
        ) from None
    try:
        source = str(Path(dataset.source).expanduser())
        splits = load_dataset(source, dataset.config, streaming=True)
        yield from splits.get("train") or next(iter(splits.values()))
    except Exception as error:  # of the network, of pyarrow, of the reader of any file type
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"dataset {show(dataset.name, 120)} cannot be read ({clip(reason.rstrip('.'), 160)}): give"
            " a folder of data files, or OWNER/NAME[:CONFIG] on the Hub."
        ) from None
