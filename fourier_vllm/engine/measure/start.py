"""At a start: the recipe that was measured before for these weights, or measure it now."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.models.utils import extract_layer_index
from vllm.tokenizers import cached_tokenizer_from_config

from fourier_vllm._text import SUBJECT
from fourier_vllm.calibration.calibrate import Options, measured_recipe, tool_version
from fourier_vllm.calibration.domains import mixed_documents, texts_digest
from fourier_vllm.calibration.hf_model import model_name
from fourier_vllm.calibration.statistics import LayerStatistics
from fourier_vllm.calibration.text import DOCUMENT_TOKENS, cut, read_text
from fourier_vllm.config import FourierConfig
from fourier_vllm.engine.binding import compressed_here
from fourier_vllm.engine.fingerprint import compressed_layers
from fourier_vllm.engine.measure import kept
from fourier_vllm.engine.measure.damage import Layer, Sizes, Texts, Watched, measure
from fourier_vllm.engine.measure.forward import Model
from fourier_vllm.engine.measure.possible import context_of
from fourier_vllm.engine.measure.ranks import from_first, gather, is_first, kv_heads
from fourier_vllm.engine.recipe_choice import EngineRecipe
from fourier_vllm.engine.start_log import logger
from fourier_vllm.recipe import FORMAT, TARGETS, Provenance, Recipe
from fourier_vllm.recipe.kept import folder

# Tokens of a document, of all of them, and of the medley for prices. Two cores take minutes for these.
TOKENS = {"cpu": (1024, 6 * 1024, 512)}
GPU_TOKENS = (DOCUMENT_TOKENS, 6 * DOCUMENT_TOKENS, 1536)
PIECE = 128  # tokens of a document in the medley
METHOD = 4  # raised where the same model and text would give another recipe


def settled(engine: EngineRecipe, vllm_config: Any, attention: Mapping[str, Any]) -> EngineRecipe:
    """The engine's recipe, once the weights of its workers are loaded; every worker has to call it.

    Parameters
    ----------
    attention : mapping of str to vllm Attention
        All attention layers of this worker, by name.

    Raises
    ------
    ValueError
        The model cannot be measured; in one sentence with the way out.
    """
    begin = time.monotonic()
    run = _Run(engine, vllm_config, attention)
    file = folder() / run.file_name()
    if is_first():
        made = False

        def make() -> Recipe:
            nonlocal made
            made = from_first(True)
            try:
                texts = run.texts()
            except ValueError as error:
                raise ValueError(f"{SUBJECT} cannot measure this model: {error}") from None
            return run.recipe(run.measure(texts))

        found = kept.find_or_make(file, run.fits, make)
        if not made:
            from_first(False)
        _log(found, run.name, time.monotonic() - begin)
        recipe = found.recipe
    elif from_first(False):
        run.measure(None)
    text = from_first(recipe.dumps() if is_first() else "")
    recipe = Recipe.loads(text, "recipe measured")
    return replace(engine, recipe=recipe, source="measured")


class _Run:
    """One engine's measurement, as one of its workers sees it."""

    def __init__(
        self, engine: EngineRecipe, vllm_config: Any, attention: Mapping[str, Any]
    ) -> None:
        self.engine, self.config = engine, vllm_config
        self.name = model_name(vllm_config.model_config.model)
        self.options = FourierConfig.from_engine(vllm_config)
        of_model, geometry = compressed_layers(vllm_config.model_config), engine.geometry
        heads = kv_heads(engine.fingerprint.num_kv_heads)
        layers = {
            name: Layer(of_model.index(extract_layer_index(name)), heads)
            for name in compressed_here(attention)
        }
        shape = engine.fingerprint
        self.watched = Watched(attention, layers, shape.num_layers, shape.num_kv_heads)
        model = attention[next(iter(layers))].impl.ancestry.model()
        self.model = Model(model, vllm_config)
        self.sizes = Sizes(
            geometry.page_size,
            TARGETS[engine.target].coefficients(geometry.page_size),
            geometry.sink_tokens,
            geometry.local_window,
        )
        self.tokens = TOKENS.get(self.model.device.type, GPU_TOKENS)

    def file_name(self) -> str:
        """Of everything that the recipe depends on; the same on every worker."""
        config = self.config
        text = self.options.calibration_text
        parts = [
            FORMAT,
            METHOD,
            tool_version(),
            self.engine.fingerprint.model_dump(mode="json"),
            str(config.model_config.dtype),
            config.model_config.quantization,
            self.sizes,
            self.tokens,
            config.parallel_config.tensor_parallel_size,
            texts_digest() if text is None else kept.digest_of_file(Path(text)),
            gather(kept.digest_of(self.model.module)),
        ]
        return kept.file_name(self.name, self.engine.target, parts)

    def fits(self, recipe: Recipe) -> bool:
        """Whether a file holds what this engine would measure."""
        sizes = (recipe.page_size, recipe.coefficients, recipe.sink_tokens, recipe.local_window)
        return recipe.model == self.engine.fingerprint and sizes == self.sizes

    def texts(self) -> Texts:
        """What the model is measured on.

        Raises
        ------
        ValueError
            The text cannot be read or is too short.
        """
        tokenizer = cached_tokenizer_from_config(self.config.model_config)
        longest, tokens, of_medley = self.tokens
        longest = min(longest, context_of(self.config.model_config))
        sizes = (tokens, self.sizes.page_size, longest)
        if self.options.calibration_text is None:
            documents = mixed_documents(tokenizer, *sizes)
        else:
            _, text = read_text(Path(self.options.calibration_text))
            documents = cut(tokenizer, text, *sizes)
        pieces = min(of_medley, longest) // PIECE
        medley = [
            documents[i % len(documents)][i // len(documents) * PIECE :][:PIECE]
            for i in range(pieces)
        ]
        return Texts(documents, torch.cat(medley))

    def measure(self, texts: Texts | None) -> list[LayerStatistics]:
        """Of all layers; the first worker brings the texts."""
        texts = from_first(texts)
        assert texts is not None
        return measure(self.model, self.watched, texts, self.sizes)

    def recipe(self, statistics: list[LayerStatistics]) -> Recipe:
        """What the target's bytes buy."""
        engine, text = self.engine, self.options.calibration_text
        geometry = engine.geometry
        return measured_recipe(
            engine.fingerprint,
            statistics,
            Options(
                model=self.name,
                target=engine.target,
                page_size=geometry.page_size,
                local_window=geometry.local_window,
                sink_tokens=geometry.sink_tokens,
                tensor_parallel_size=self.config.parallel_config.tensor_parallel_size,
            ),
            Provenance(
                source="measured",
                text="texts of fourier-vllm" if text is None else Path(text).name,
                tokens=self.tokens[1],
                date=datetime.now(timezone.utc).date().isoformat(),
                tool=tool_version(),
                model=self.name,
            ),
        )


def _log(found: kept.Kept, model: str, seconds: float) -> None:
    if not found.is_new:
        logger.info("fourier: recipe of %s found in %s", model, found.file)
    elif found.file is not None:
        logger.info(
            "fourier: recipe of %s measured in %.0f s, once; kept in %s", model, seconds, found.file
        )
    else:
        logger.warning(
            "fourier: recipe of %s measured in %.0f s, at every start, as %s cannot be written "
            "(FOURIER_CACHE sets it)",
            model,
            seconds,
            folder(),
        )
