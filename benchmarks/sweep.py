"""The sweep behind the defaults: what each choice of the page format costs at equal bytes.

    python -m benchmarks.sweep [--model FOLDER] [--only coefficients rope ...]

Every row is calibrated on the default text and scored on manuals that neither calibration nor evaluation
reads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.record import RESULTS, save, small_model
from fourier_vllm.calibration import allocate_model as spending
from fourier_vllm.calibration import collect as collecting
from fourier_vllm.calibration import statistics
from fourier_vllm.calibration.calibrate import Options, measured_recipe
from fourier_vllm.calibration.hf_model import fingerprint_of, load, model_name
from fourier_vllm.calibration.text import cut, read_text
from fourier_vllm.evaluation import held_out as loop
from fourier_vllm.evaluation.machine import commit, machine, versions
from fourier_vllm.evaluation.text import MODULES, manual
from fourier_vllm.kernels.reference import codecs
from fourier_vllm.recipe import TARGETS, Provenance, Recipe
from fourier_vllm.recipe.describe import ratio_of

TEXT = (
    "socketserver", "http.server", "unittest.mock", "doctest", "signal", "urllib.parse", "codecs",
    "http.cookiejar", "operator", "dis", "numbers", "secrets", "struct", "wave", "html.parser",
)  # fmt: skip
DOCUMENTS = 4
CONTEXT = 6016
SCORED = 512


@dataclass(frozen=True)
class Choice:
    """One row: a page format and how its bytes are spent."""

    ratio: float = 6.3
    page_size: int = 128
    coefficients: int = 4
    coefficient_bits: int = 8
    local_window: int = 256
    sink_tokens: int = 16
    v_bits: tuple[int, ...] = statistics.VALUE_BITS
    share: str = "model"  # what one budget is spent over: model, layer or head
    rope: str = "after"
    basis: str = "dct"

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.page_size, self.coefficients, self.sink_tokens, self.local_window


def choices() -> dict[str, list[Choice]]:
    """Rows of each table."""
    base, quality = Choice(), Choice(ratio=4.5)
    widths = (64, 128, 256)
    return {
        "coefficients": [
            replace(base, page_size=W, coefficients=m) for W in widths for m in (0, 1, 2, 4, 8, 16)
        ],
        "coefficients, 4.5 times smaller": [
            replace(quality, page_size=W, coefficients=m) for W in widths for m in (0, 1, 4, 8)
        ],
        "coefficient width": [
            replace(base, coefficients=m, coefficient_bits=b) for m in (1, 4, 8) for b in (8, 16)
        ],
        "local window": [replace(base, local_window=L) for L in (64, 128, 256, 512, 1024)],
        "pinned tokens": [replace(base, sink_tokens=S) for S in (0, 4, 16, 64)],
        "one budget over": [
            replace(x, share=share) for x in (base, quality) for share in ("model", "layer", "head")
        ],
        "keys stored": [replace(base, rope=rope) for rope in ("after", "before")],
        "basis": [
            replace(base, basis=basis, coefficients=m)
            for m in (3, 5, 9)
            for basis in ("dct", "fourier")
        ],
        "V bits": [
            replace(x, v_bits=bits)
            for x in (base, quality)
            for bits in ((2,), (3,), (4,), (2, 3, 4), statistics.VALUE_BITS)
        ],
    }


def fourier_basis(page_size: int, coefficients: int) -> Tensor:
    """1, cos, sin, cos, sin, ... of rising frequency over a page, orthonormal, `[m, W]` float64."""
    t = 2 * torch.pi / page_size * torch.arange(page_size, dtype=torch.float64)
    rows = [torch.ones_like(t)]
    for j in range(1, coefficients // 2 + 1):
        rows += [torch.cos(j * t), torch.sin(j * t)]
    basis = torch.stack(rows)[:coefficients]
    return basis / basis.norm(dim=1, keepdim=True)


@dataclass
class Rope:
    """RoPE of one model, on and off, with dims i and i + D/2 paired."""

    model: Any
    tables: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def table(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[tokens, D]`."""
        if tokens not in self.tables:
            device = self.model.device
            places = torch.arange(tokens, device=device)[None]
            cos, sin = self.model.base_model.rotary_emb(torch.zeros(1, device=device), places)
            self.tables[tokens] = cos[0].float(), sin[0].float()
        return self.tables[tokens]

    def turn(self, x: Tensor, forward: bool) -> Tensor:
        """`x [..., T, D]` float32 with RoPE applied or undone."""
        cos, sin = self.table(x.shape[-2])
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        return x * cos + turned * (sin if forward else -sin)


class SumsBeforeRope(statistics.Sums):
    """Damage where the dims of a page are those of keys before RoPE."""

    rope: Rope

    def _stored(self, k: Tensor) -> Tensor:
        return self.rope.turn(k, forward=False)

    def _key_change(self, q: Tensor, reads: Tensor, error: Tensor) -> Tensor:
        cos, sin = self.rope.table(error.shape[-2])
        first, second = q.chunk(2, -1)
        crossed = torch.cat([second, -first], -1)
        return q * (reads @ (error * cos)) + crossed * (reads @ (error * sin))


@contextmanager
def as_chosen(choice: Choice, rope: Rope) -> Iterator[None]:
    """The package with the parts of a choice that are no options of it."""
    with ExitStack() as stack:
        if choice.basis == "fourier":
            for module in (codecs, statistics):
                stack.enter_context(patch.object(module, "dct_basis", fourier_basis))
        stack.enter_context(patch.object(spending, "VALUE_BITS", choice.v_bits))
        if choice.rope == "before":
            SumsBeforeRope.rope = rope
            sealed = loop.through_pages

            def through_pages(k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
                held, v = sealed(rope.turn(k.float(), forward=False), v, *rest)
                return rope.turn(held, forward=True).to(k.dtype), v

            stack.enter_context(patch.object(collecting, "Sums", SumsBeforeRope))
            stack.enter_context(patch.object(loop, "through_pages", through_pages))
        yield


def recipe_of(choice: Choice, measured: Sequence[Any], model: Any) -> Recipe:
    """Spend the bytes of a choice."""
    fingerprint = fingerprint_of(model)
    options = Options(
        model="",
        bits=16 / choice.ratio,
        page_size=choice.page_size,
        local_window=choice.local_window,
        sink_tokens=choice.sink_tokens,
        tensor_parallel_size=fingerprint.num_kv_heads if choice.share == "head" else 1,
    )
    target = TARGETS["balanced"]._replace(
        coefficient_share=choice.coefficients / choice.page_size,
        coefficient_bits=choice.coefficient_bits,
    )
    source = Provenance(source="calibrated")
    with patch.dict(TARGETS, balanced=target):
        if choice.share == "model":
            return measured_recipe(fingerprint, measured, options, source)
        one = fingerprint.model_copy(update={"num_layers": 1})
        parts = [measured_recipe(one, [layer], options, source) for layer in measured]
    layers = tuple(part.layers[0] for part in parts)
    return parts[0].model_copy(update={"model": fingerprint, "layers": layers})


def texts(count: int, chars: int) -> list[str]:
    """Documents of `chars` characters from manuals that nothing else of this project reads."""
    assert not set(TEXT) & set(MODULES)
    whole = "\n".join(manual(name) for name in TEXT)
    if len(whole) < count * chars:
        raise SystemExit(f"the manuals have {len(whole)} characters, {count * chars} are needed")
    return [whole[i * len(whole) // count :][:chars] for i in range(count)]


def run(args: argparse.Namespace, folder: str) -> None:
    """Measure the rows of the chosen tables; the JSON is written after each of them."""
    model, tokenizer = load(folder)
    calibration = read_text(None)[1]
    encoded = [tokenizer(text, verbose=False).input_ids for text in texts(DOCUMENTS, 40_000)]
    documents = [torch.tensor(ids[: CONTEXT + SCORED]) for ids in encoded]
    assert all(len(ids) == CONTEXT + SCORED for ids in documents)
    rope = Rope(model)
    rows: dict[Choice, dict[str, Any]] = {}
    measured: dict[Any, Any] = {}
    record: dict[str, Any] = {
        "model": model_name(folder),
        "documents": DOCUMENTS,
        "context": CONTEXT,
        "scored": SCORED,
        "calibration_tokens": args.tokens,
        "versions": versions(),
        "machine": machine(str(model.device)),
        "commit": commit(),
        "tables": {},
    }
    for table, of_table in choices().items():
        for choice in of_table if not args.only or table in args.only else []:
            if choice in rows:
                continue
            started = time.perf_counter()
            key = (choice.sizes, choice.rope, choice.basis)
            with as_chosen(choice, rope):
                if key not in measured:
                    cuts = cut(tokenizer, calibration, args.tokens, choice.page_size)
                    measured[key] = collecting.collect(model, cuts, *choice.sizes)
                recipe = recipe_of(choice, measured[key], model)
                scores = [
                    loop.score(model, ids[:CONTEXT], ids[CONTEXT:], [recipe]) for ids in documents
                ]
            kl = [losses[0].kl for _, losses in scores]
            rows[choice] = {
                "smaller": round(ratio_of(recipe), 3),
                "kl": sum(kl) / len(kl),
                "kl_of_documents": kl,
                "nll": sum(losses[0].nll - exact for exact, losses in scores) / len(scores),
            }
            seconds = time.perf_counter() - started
            print(f"{table}: {choice} {rows[choice]['kl']:.5f} {seconds:.1f} s", flush=True)
        if not args.only or table in args.only:
            record["tables"][table] = [asdict(choice) | rows[choice] for choice in of_table]
            save(args.out, record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder; default: SmolLM2-135M-Instruct, fetched")
    parser.add_argument("--only", nargs="*", choices=list(choices()), help="tables; default: all")
    parser.add_argument("--tokens", type=int, default=16384, help="of calibration text")
    parser.add_argument("--out", type=Path, default=RESULTS / "sweep.json")
    args = parser.parse_args()
    run(args, args.model or small_model())


if __name__ == "__main__":
    main()
