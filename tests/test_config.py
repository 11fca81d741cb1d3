"""Options: defaults, refusals in one sentence, and how they combine with a recipe."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fourier_vllm.config import FourierConfig, options
from fourier_vllm.recipe import ModelFingerprint, target_recipe


def refusal(value) -> str:
    with pytest.raises(ValueError, match="additional_config fourier") as caught:
        FourierConfig.from_dict(value)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    assert message.endswith(".")
    return message


def test_needs_neither_torch_nor_vllm():
    code = (
        "import sys, fourier_vllm.config, fourier_vllm.recipe;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'vllm', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_defaults():
    config = FourierConfig.from_dict({})
    assert config == FourierConfig() == FourierConfig.from_dict(None)
    assert (config.target, config.recipe, config.prefill) == (None, None, "windowed")
    assert config.geometry() == (128, 256, 16, None)


@pytest.mark.parametrize(
    "value",
    [
        {"target": "quality", "prefill": "exact", "recipe": "r.json"},
        {"target": "paper", "recipe": "measured"},
        {"target": "compact", "recipe": "weights"},
        {"recipe": "./own-text"},
        {"calibration_text": "notes.txt", "target": "quality"},
        {"calibration_text": "notes.txt", "recipe": "measured"},
        {"page_size": 32, "local_window": 16, "sink_tokens": 32, "local_block_size": 8},
        {"page_size": 256, "local_window": 65536, "sink_tokens": 0, "local_block_size": 256},
        dict.fromkeys(("recipe", "page_size", "local_window", "sink_tokens", "local_block_size")),
    ],
)
def test_accepts(value):
    config = FourierConfig.from_dict(value)
    assert all(getattr(config, name) == v for name, v in value.items())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (3, ["object of options", "found 3", "--additional-config"]),
        (["target"], ["object of options", "a list of 1"]),
        ({"targt": "x"}, ["unknown option 'targt'", "did you mean 'target'"]),
        ({"zzz": 1}, ["unknown option 'zzz'", "local_window"]),
        ({7: 1}, ["unknown option 7"]),
        ({"target": "ballanced"}, ["target", "did you mean 'balanced'", "lossless"]),
        ({"target": 1}, ["target must be one of quality", "found 1"]),
        ({"prefill": True}, ["prefill must be one of windowed, exact", "found true"]),
        ({"recipe": ""}, ["recipe must be the path", "found ''"]),
        ({"recipe": "measured", "target": "lossless"}, ["recipe must be a path", "leave it out"]),
        ({"recipe": "weights", "target": "lossless"}, ["recipe must be a path", "leave it out"]),
        ({"recipe": "own-text"}, ["replaced by 'measured'", "or ./own-text for a file"]),
        ({"recipe": "own-text", "target": "lossless"}, ["replaced by 'measured'"]),
        ({"calibration_text": " "}, ["calibration_text must be the path", "leave it out"]),
        ({"calibration_text": 3}, ["calibration_text must be the path", "found 3"]),
        ({"calibration_text": "a", "recipe": "r.json"}, ["beside recipe 'r.json'", "leave one"]),
        ({"calibration_text": "a", "recipe": "weights"}, ["beside recipe 'weights'"]),
        ({"calibration_text": "a", "target": "lossless"}, ["beside target lossless", "leave one"]),
        ({"recipe": {"format": 1}}, ["recipe must be the path", "an object of 1"]),
        ({"page_size": 100}, ["page_size must be 32, 64, 128, 256", "found 100"]),
        ({"page_size": 128.0}, ["page_size", "found 128.0"]),
        ({"page_size": True}, ["page_size", "found true"]),
        ({"page_size": float("nan")}, ["page_size", "found nan"]),
        ({"local_window": 100}, ["local_window must be a multiple of 16", "try 112"]),
        ({"local_window": 0}, ["local_window", "from 16 to 65536", "try 16"]),
        ({"local_window": 10**5000}, ["local_window", "a very large integer", "try 65536"]),
        ({"local_window": "256"}, ["local_window", "found '256'", "try 256"]),
        ({"sink_tokens": -1}, ["sink_tokens", "from 0 to 256"]),
        ({"sink_tokens": 129, "page_size": 128}, ["sink_tokens", "from 0 to 128", "found 129"]),
        ({"local_block_size": 24}, ["local_block_size", "8, 16, 32, 64, 128, 256"]),
        ({"local_block_size": 128, "page_size": 64}, ["divides a page of 64", "8, 16, 32, 64."]),
        ({"local_block_size": True}, ["local_block_size", "found true"]),
        ({"x" * 9999: 1}, ["unknown option"]),
        ({"target": "a\nb\u2028c"}, ["found 'a\\nb"]),
    ],
)
def test_refuses(value, words):
    message = refusal(value)
    for word in words:
        assert word in message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([o.name for o in options()]) | st.text(), JSON) | JSON)
def test_any_value_is_a_config_or_one_sentence(value):
    try:
        FourierConfig.from_dict(value)
    except ValueError:
        refusal(value)


def test_geometry_with_a_recipe():
    model = ModelFingerprint(
        architecture="X", num_layers=1, num_heads=2, num_kv_heads=1, head_size=8
    )
    recipe = target_recipe(model, "lossless", page_size=64, sink_tokens=4, local_window=512)
    assert FourierConfig().geometry(recipe) == (64, 512, 4, None)
    chosen = FourierConfig(page_size=64, local_window=128, sink_tokens=0, local_block_size=32)
    assert chosen.geometry(recipe) == (64, 128, 0, 32)
    for config, word in [
        (FourierConfig(page_size=128), "page_size must be 64, the recipe's, found 128"),
        (FourierConfig(sink_tokens=65), "sink_tokens"),
        (FourierConfig(local_block_size=128), "local_block_size"),
    ]:
        with pytest.raises(ValueError, match=word):
            config.geometry(recipe)


def test_options_are_documented():
    table = options()
    assert [row.name for row in table] == list(FourierConfig.__dataclass_fields__)
    assert all(row.default and row.values and row.help for row in table)
