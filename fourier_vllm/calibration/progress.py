"""What an interrupted calibration had summed up, beside the recipe it was for."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fourier_vllm._text import show
from fourier_vllm.calibration.arrays import save_arrays


@dataclass
class Progress:
    """A file of sums after each document.

    Attributes
    ----------
    path : Path
        NumPy archive.
    key : str
        Of everything the sums depend on; a file with another key is not used.
    num_done : int
        Documents the sums stand for.
    sums : list of dict of str to Tensor
        One per layer.
    """

    path: Path
    key: str
    num_done: int = 0
    sums: list[dict[str, Tensor]] = field(default_factory=list)

    @classmethod
    def resume(cls, path: Path, *parts: object, documents: Sequence[Tensor]) -> Progress:
        """Read the file where it is there and of the same calibration.

        Raises
        ------
        ValueError
            The file is there and is no progress file, or a damaged one.
        """
        digest = hashlib.sha256(json.dumps([str(part) for part in parts]).encode())
        for ids in documents:
            digest.update(ids.numpy().tobytes())
        progress = cls(path, digest.hexdigest())
        try:
            with np.load(path, allow_pickle=False) as archive:
                if str(archive["key"]) != progress.key:
                    print(f"{path} is of another model, text or options: starting anew")
                    return progress
                sums: list[dict[str, Tensor]] = [{} for _ in range(int(archive["num_layers"]))]
                for entry in archive.files:
                    layer, _, name = entry.partition("/")
                    if name:
                        sums[int(layer)][name] = torch.from_numpy(archive[entry])
                progress.num_done, progress.sums = int(archive["num_done"]), sums
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, LookupError, EOFError, zipfile.BadZipFile):
            raise ValueError(
                f"progress {show(path, 120)} is damaged or cannot be read: delete it to start anew."
            ) from None
        return progress

    def save(self, num_done: int, sums: Sequence[dict[str, Tensor]]) -> None:
        """Write the file atomically; raises ValueError where it cannot be written."""
        arrays = {f"{i}/{name}": x.numpy() for i, of in enumerate(sums) for name, x in of.items()}
        head = {"key": self.key, "num_done": num_done, "num_layers": len(sums)}
        save_arrays(self.path, "progress", arrays | {k: np.array(x) for k, x in head.items()})
