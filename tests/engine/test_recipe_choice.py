"""Where an engine's recipe comes from, and what the start says and refuses about that."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fourier_vllm.engine import recipe_choice, start_log
from fourier_vllm.engine.fingerprint import fingerprint_of
from fourier_vllm.engine.recipe_choice import EngineRecipe, engine_recipe
from fourier_vllm.engine.refuse import check_measurable
from fourier_vllm.recipe import target_recipe
from tests.support.refusals import check_sentence, refusal
from tests.support.scheduling import LLAMA, engine_config

REAL: dict[str, Any] = dict(load_format="auto", skip_tokenizer_init=False)
MOE = LLAMA | dict(
    architectures=["Qwen3MoeForCausalLM"],
    model_type="qwen3_moe",
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
)


@pytest.fixture
def config(tmp_path):
    """The configuration of an engine on a device; what starts the engine is not run."""

    def config(device: str = "cuda", model: dict[str, Any] | None = None, **fourier: Any) -> Any:
        found = engine_config(tmp_path, model, max_model_len=512, **REAL)
        found.device_config.device_type = device
        found.additional_config = {"fourier": fourier}
        return found

    return config


def facts(engine: EngineRecipe) -> tuple[str, bool, bool]:
    return engine.target, engine.is_measured, engine.is_predicted


def test_nothing_set(config):
    assert facts(engine_recipe(config("cuda"))) == ("balanced", True, False)
    assert facts(engine_recipe(config("cpu"))) == ("quality", False, True)


def test_asked_for(config):
    for device in ("cuda", "cpu"):
        for options in (dict(recipe="measured"), dict(calibration_text="notes.txt")):
            found = engine_recipe(config(device, **options, target="compact"))
            assert facts(found) == ("compact", True, False)
        assert facts(engine_recipe(config(device, recipe="weights"))) == ("quality", False, True)


def test_order(config, tmp_path, monkeypatch):
    """A file, the model's own config, what is shipped; by name neither of the last two."""
    bare = config()
    recipe = target_recipe(fingerprint_of(bare.model_config), "paper")
    recipe.save(tmp_path / "r.json")
    monkeypatch.setattr(recipe_choice, "_find_bundled", lambda *_: recipe)
    assert engine_recipe(bare).source.startswith("bundled")
    bare.model_config.hf_config.fourier_attention = json.loads(recipe.dumps())
    assert engine_recipe(bare).source == "the model's config"
    for options, source in (
        (dict(recipe=str(tmp_path / "r.json")), str(tmp_path / "r.json")),
        (dict(recipe="measured"), "measured on this model"),
        (dict(calibration_text="notes.txt"), "measured on this model"),
        (dict(recipe="weights"), "predicted from the weights"),
    ):
        bare.additional_config = {"fourier": options}
        assert engine_recipe(bare).source == source


@pytest.mark.parametrize("change", ["dummy", "tokenizer", "context", "experts"])
def test_a_model_that_cannot_be_measured(config, change):
    """Predicted where nothing is set, refused where it is asked for."""
    found, words = config(model=MOE), ""
    if change == "dummy":
        found.load_config.load_format = "dummy"
    elif change == "tokenizer":
        found.model_config.skip_tokenizer_init, words = True, "--skip-tokenizer-init"
    elif change == "context":
        found.model_config.hf_text_config.max_position_embeddings = 512
        words = "a context of 512 tokens is shorter than the 1024"
    else:
        found.parallel_config.data_parallel_size = 2
        found.parallel_config.is_moe_model, words = True, "its experts are shared"
    assert facts(engine_recipe(found)) == ("quality", False, True)
    check_measurable(found)
    found.additional_config = {"fourier": {"recipe": "measured"}}
    if change == "dummy":  # by name, made-up weights are measured
        check_measurable(found)
        assert engine_recipe(found).is_measured
        return
    for options in (dict(recipe="measured"), dict(calibration_text="notes.txt")):
        found.additional_config = {"fourier": options}
        with pytest.raises(ValueError, match="cannot measure this model") as caught:
            check_measurable(found)
        check_sentence(str(caught.value), words, "leave out the options `recipe`")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(skip_tokenizer_init=True), ["(--skip-tokenizer-init leaves it without a tokenizer)"]),
        (dict(model=LLAMA | dict(max_position_embeddings=512)), ["512 tokens is shorter than"]),
    ],
)
def test_refused_at_the_start(tmp_path, options, words):
    settings = REAL | dict(additional_config={"fourier": {"recipe": "measured"}}) | options
    check_sentence(refusal(tmp_path, settings.pop("model", None), **settings), *words)


def test_old_name(tmp_path):
    additional = {"fourier": {"recipe": "own-text"}}
    message = refusal(tmp_path, additional_config=additional, **REAL)
    check_sentence(message, "was replaced by 'measured'")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(), [["not measured: a CPU takes minutes", "target quality", "calibrate"]]),
        (dict(recipe="weights"), []),
        (dict(recipe="measured"), []),
        (dict(recipe="weights", target="balanced"), [["lost answers of real models"]]),
    ],
)  # fmt: skip
def test_what_the_start_says(tmp_path, monkeypatch, options, words):
    said: list[str] = []
    monkeypatch.setattr(
        start_log.logger, "warning_once", lambda line, *values: said.append(line % values)
    )
    settings = REAL | dict(attention_backend="fourier", max_model_len=512)
    engine_config(tmp_path, additional_config={"fourier": options}, **settings)
    ours = [line for line in said if line.startswith("fourier: ")]
    for line, expected in zip(ours, words, strict=True):
        assert all(word in line for word in expected)
