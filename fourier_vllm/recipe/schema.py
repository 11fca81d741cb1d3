"""Recipes: the bits that every K and V dim of a model gets inside a sealed page.

A recipe is a JSON file of format 1 under a closed schema: numbers, no code. This module needs
neither torch nor vLLM. Whatever is wrong ends in one `RecipeError` of one sentence.

Bits of a K dim, and of a V dim under the channel codec:

    0        spectral coefficients only
    2, 4, 8  coefficients + residual codes of that many bits, one fp16 scale and zero a page and dim
    16       kept raw in the model's dtype; the coefficients of the dim are not used

`v` of a layer is one int (token codec: orthonormal rotation, then min/max per token; 16 is raw), or
bits per head and dim like `k` (channel codec, as in the paper).
"""

from __future__ import annotations

import json
import os
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fourier_vllm import _json
from fourier_vllm._json import RecipeError
from fourier_vllm._text import show
from fourier_vllm.recipe.bits import KBits, Rows, VBits, as_tuple, exact, wrong
from fourier_vllm.recipe.errors import WAY_OUT, sentence

FORMAT = 1
PAGE_SIZES = (32, 64, 128, 256)
MAX_LAYERS = 1024
DEFAULT_PAGE_SIZE: Literal[128] = 128
DEFAULT_SINK_TOKENS = 16
DEFAULT_LOCAL_WINDOW = 256


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelFingerprint(_Model):
    """The shape of the model that a recipe is for.

    Attributes
    ----------
    architecture : str
        First of the HF config's `architectures`.
    num_layers : int
        Attention layers with a sealed cache; all layers of a plain decoder.
    num_heads, num_kv_heads : int
        Query and KV heads of the whole model, or of one rank after `Recipe.rank_slice`.
    head_size : int
        Dims of a head, a multiple of 8.
    rope_theta : float or None
        RoPE base; None where there is none or it is unknown, which fits any.
    """

    architecture: str = Field(min_length=1, max_length=128)
    num_layers: int = Field(ge=1, le=MAX_LAYERS)
    num_heads: int = Field(ge=1, le=4096)
    num_kv_heads: int = Field(ge=1, le=4096)
    head_size: int = Field(ge=8, le=1024, multiple_of=8)
    rope_theta: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check(self) -> ModelFingerprint:
        if self.num_heads % self.num_kv_heads:
            kv_heads = f"num_kv_heads {self.num_kv_heads}"
            found = f"found {self.num_heads}"
            raise wrong(f"must have num_heads a multiple of {kv_heads}, {found}")
        return self


class LayerRecipe(_Model):
    """Bits of one layer.

    Attributes
    ----------
    k : tuple of tuple of int
        Bits of each dim, `[num_kv_heads][head_size]`, in {0, 2, 4, 8, 16}.
    v : int or tuple of tuple of int
        Bits of the token codec in {2, 3, 4, 8, 16}, or bits per dim like `k`.
    """

    k: KBits
    v: VBits


class Provenance(_Model):
    """Where a recipe comes from.

    Attributes
    ----------
    source : {"calibrated", "measured", "weights", "manual"}
        Measured on text by `fourier-vllm calibrate`, or by an engine, predicted from the weights, or
        written by hand.
    text, date, tool, model : str or None
        Calibration text, ISO date, tool and version, model id and revision.
    tokens : int or None
        Calibration tokens.
    kl, nll : float or None
        KL to exact attention and rise of the NLL on held-out text, nats a token.
    """

    source: Literal["calibrated", "measured", "weights", "manual"]
    text: str | None = Field(default=None, max_length=2048)
    tokens: int | None = Field(default=None, ge=0, le=1 << 62)
    date: str | None = Field(default=None, max_length=64)
    tool: str | None = Field(default=None, max_length=128)
    model: str | None = Field(default=None, max_length=512)
    kl: float | None = None
    nll: float | None = None


class Recipe(_Model):
    """One recipe, immutable and checked.

    Attributes
    ----------
    name : str
        The target it serves ("balanced"), or a name of the user's own.
    model : ModelFingerprint
        The model it fits.
    page_size, sink_tokens, local_window : int
        Tokens of a page, first tokens kept raw, recent tokens kept raw.
    coefficients : int
        Orthonormal DCT-II coefficients a page and dim, 0 to `page_size`.
    coefficient_bits : int
        8 (one fp16 scale a coefficient row) or 16 (model dtype).
    layers : tuple of LayerRecipe
        One entry for each of the model's `num_layers`.
    provenance : Provenance
    """

    format: Literal[1] = 1
    name: str = Field(min_length=1, max_length=128)
    model: ModelFingerprint
    page_size: Annotated[Literal[32, 64, 128, 256], BeforeValidator(exact)] = DEFAULT_PAGE_SIZE
    sink_tokens: int = Field(default=DEFAULT_SINK_TOKENS, ge=0)
    local_window: int = Field(default=DEFAULT_LOCAL_WINDOW, ge=16, le=65536, multiple_of=16)
    coefficients: int = Field(ge=0)
    coefficient_bits: Annotated[Literal[8, 16], BeforeValidator(exact)] = 8
    layers: Annotated[tuple[LayerRecipe, ...], BeforeValidator(as_tuple)]
    provenance: Provenance

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        def expect(place: str, rule: str, good: bool, found: int) -> None:
            if not good:
                raise wrong(f"{place} must be {rule}, found {show(found)}")

        W, model = self.page_size, self.model
        expect("sink_tokens", f"0 to page_size {W}", self.sink_tokens <= W, self.sink_tokens)
        expect("coefficients", f"0 to page_size {W}", self.coefficients <= W, self.coefficients)
        L, H, D = model.num_layers, model.num_kv_heads, model.head_size
        expect("the length of layers", f"num_layers {L}", len(self.layers) == L, len(self.layers))
        for i, layer in enumerate(self.layers):
            for name, rows in (("k", layer.k), ("v", layer.v)):
                if isinstance(rows, int):
                    continue
                place = f"the length of layers[{i}].{name}"
                expect(place, f"num_kv_heads {H}", len(rows) == H, len(rows))
                for h, row in enumerate(rows):
                    expect(f"{place}[{h}]", f"head_size {D}", len(row) == D, len(row))
        return self

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe file.

        Parameters
        ----------
        path : str or path
            A regular file of at most 16 MiB; `~` is expanded.

        Raises
        ------
        RecipeError
            The file is missing or unreadable, or `loads` refuses it.
        """
        origin = f"recipe {show(path, 120)}"
        return cls.loads(_json.read(path, origin), origin)

    @classmethod
    def loads(cls, text: str | bytes, origin: str = "recipe") -> Recipe:
        """Parse JSON text of at most 16 MiB.

        Parameters
        ----------
        text : str or bytes
            Bytes are UTF-8.
        origin : str
            How messages name the text.

        Raises
        ------
        RecipeError
            Not UTF-8, not JSON, a newer format, or a field outside the schema.
        """
        return cls.from_dict(_json.parse(text, origin), origin)

    @classmethod
    def from_dict(cls, data: object, origin: str = "recipe") -> Recipe:
        """Check plain data, e.g. a recipe inside an HF config.

        Raises
        ------
        RecipeError
            A newer format, or a field outside the schema.
        """
        if not isinstance(data, dict):
            raise RecipeError(f"{origin} must be a JSON object, found {show(data)}: {WAY_OUT}")
        version = data.get("format")
        if type(version) is not int or version < 1:
            found = show(version) if "format" in data else "no such field"
            raise RecipeError(f"{origin}: format must be {FORMAT}, found {found}: {WAY_OUT}")
        if version > FORMAT:
            # Before the schema: a newer format may look different.
            raise RecipeError(
                f"{origin} has format {show(version)} and this version reads formats up to"
                f" {FORMAT}: upgrade with `pip install --upgrade fourier-vllm`."
            )
        layers = data.get("layers")
        if isinstance(layers, (list, tuple)) and len(layers) > MAX_LAYERS:
            length = f"the length of layers must be at most {MAX_LAYERS}, found {len(layers)}"
            raise RecipeError(f"{origin}: {length}: {WAY_OUT}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise RecipeError(f"{origin}: {sentence(error, MODELS)}") from None

    def dumps(self) -> str:
        """JSON text: one line a head, equal for equal recipes."""
        fields = self.model_dump(mode="json", exclude={"layers", "provenance"})
        lines = ["{", *(f"  {json.dumps(k)}: {json.dumps(v)}," for k, v in fields.items())]
        layers = (f'    {{"k": {_text(x.k)},\n     "v": {_text(x.v)}}}' for x in self.layers)
        lines += ['  "layers": [', ",\n".join(layers), "  ],"]
        provenance = self.provenance.model_dump(mode="json", exclude_none=True)
        return "\n".join([*lines, f'  "provenance": {json.dumps(provenance)}', "}", ""])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe atomically; raises RecipeError where it cannot be written."""
        _json.write(path, self.dumps(), f"recipe {show(path, 120)}")

    def check_fits(self, fingerprint: ModelFingerprint) -> None:
        """Raise RecipeError naming the first field in which the model differs."""
        for name in ModelFingerprint.model_fields:
            expected, found = getattr(self.model, name), getattr(fingerprint, name)
            same = expected == found
            if name == "rope_theta" and not same:
                # Unknown contradicts nothing; some configs went through float32.
                unknown = expected is None or found is None
                same = unknown or abs(expected - found) <= 1e-6 * expected
            if not same:
                raise RecipeError(
                    f"recipe {show(self.name)} needs a model of {name} {show(expected)}, found"
                    f" {show(found)}: leave the option `recipe` out, or make a recipe for this"
                    " model with `fourier-vllm calibrate`."
                )

    def rank_slice(self, rank: int, world: int) -> Recipe:
        """The recipe of one tensor-parallel rank.

        Heads are contiguous; with more ranks than KV heads, rank r holds head `r * H // world`.

        Parameters
        ----------
        rank, world : int
            This rank and the number of ranks.

        Raises
        ------
        RecipeError
            The rank is out of range, or the heads cannot be shared out evenly.
        """
        Hq, H = self.model.num_heads, self.model.num_kv_heads
        if not 0 <= rank < max(1, world):
            rule = f"0 to {show(max(0, world - 1))}"
            raise RecipeError(
                f"tensor-parallel rank must be {rule}, found {show(rank)}: check how the workers"
                " are started."
            )
        if world < 1 or Hq % world or (H % world and world % H):
            raise RecipeError(
                f"tensor_parallel_size must divide {Hq} query heads and divide, or be a multiple"
                f" of, {H} KV heads, found {show(world)}: choose another one."
            )
        count = max(1, H // world)
        heads = slice(rank * H // world, rank * H // world + count)
        model = self.model.model_copy(update={"num_heads": Hq // world, "num_kv_heads": count})
        layers = tuple(
            LayerRecipe(k=x.k[heads], v=x.v if isinstance(x.v, int) else x.v[heads])
            for x in self.layers
        )
        return self.model_copy(update={"model": model, "layers": layers})


MODELS: dict[str, type[BaseModel]] = {
    "": Recipe,
    "model": ModelFingerprint,
    "layers": LayerRecipe,
    "provenance": Provenance,
}


def _text(bits: int | Rows) -> str:
    if isinstance(bits, int):
        return str(bits)
    # Heads under each other: eleven columns into the line.
    return f"[{(',' + chr(10) + ' ' * 11).join(json.dumps(row) for row in bits)}]"
