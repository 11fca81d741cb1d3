"""Recipes: round trips, refusals in one sentence, slices of ranks."""

import copy
import json
import os
import stat

import pytest

from fourier_vllm.recipe import (
    Recipe,
    RecipeError,
)
from tests.support.recipes import MODEL, VALID, checked, refusal


def test_round_trip(tmp_path):
    recipe = Recipe.loads(json.dumps(VALID))
    text = recipe.dumps()
    assert Recipe.loads(text) == recipe
    assert Recipe.loads(("\ufeff" + text).encode()) == recipe
    assert Recipe.loads(text).dumps() == text
    assert text.count("[0, 16, 8, 4, 2, 0, 0, 0]") == 2
    assert max(map(len, text.splitlines())) < 160
    path = tmp_path / "r.json"
    path.write_text("old")
    recipe.save(path)
    assert Recipe.load(path) == recipe == Recipe.load(str(path))
    assert os.listdir(tmp_path) == ["r.json"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o400


def test_frozen():
    recipe = Recipe.loads(json.dumps(VALID))
    with pytest.raises(ValueError, match="frozen"):
        recipe.page_size = 64
    assert hash(recipe) == hash(Recipe.loads(json.dumps(VALID)))


def put(*path_and_value):
    *path, last, value = path_and_value

    def change(data):
        for part in path:
            data = data[part]
        data[last] = value

    return change


def drop(*path):
    def change(data):
        for part in path[:-1]:
            data = data[part]
        del data[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("format", 2), ["format 2", "up to 1", "upgrade"]),
        (put("format", True), ["format must be 1", "found true"]),
        (put("format", 0), ["format must be 1", "found 0"]),
        (drop("format"), ["format must be 1", "no such field"]),
        (drop("name"), ["name is missing"]),
        (put("name", ""), ["name must have at least 1 character"]),
        (put("name", 3), ["name must be a valid string", "found 3"]),
        (put("modle", 1), ["unknown field modle", "did you mean 'model'"]),
        (put("{a}\n" * 99, 1), ["unknown field {a}"]),
        (put("page_size", 100), ["page_size must be 32, 64, 128 or 256", "found 100"]),
        (put("page_size", 128.0), ["page_size must be an integer", "found 128.0"]),
        (put("sink_tokens", 129), ["sink_tokens must be 0 to page_size 128", "found 129"]),
        (put("sink_tokens", -1), ["sink_tokens must be greater than or equal to 0"]),
        (put("local_window", 17), ["local_window must be a multiple of 16", "found 17"]),
        (put("local_window", 1 << 20), ["local_window must be less than or equal to 65536"]),
        (put("coefficients", 129), ["coefficients must be 0 to page_size 128", "found 129"]),
        (put("coefficients", True), ["coefficients must be a valid integer", "found true"]),
        (put("coefficient_bits", 4), ["coefficient_bits must be 8 or 16", "found 4"]),
        (put("coefficient_bits", True), ["coefficient_bits must be an integer", "found true"]),
        (put("layers", []), ["the length of layers must be num_layers 2", "found 0"]),
        (put("layers", {}), ["layers must be a list", "an object of 0"]),
        (put("layers", [{}] * 5000), ["at most 1024", "found 5000"]),
        (put("layers", 0, "k"), ["layers[0] must be a JSON object", "found 'k'"]),
        (put("layers", 1, "w", 1), ["unknown field layers[1].w", "k, v"]),
        (drop("layers", 1, "v"), ["layers[1].v is missing"]),
        (put("layers", 0, "k", 4), ["layers[0].k must be one list of bits per KV head"]),
        (put("layers", 0, "k", 1, 4), ["layers[0].k", "for head 1", "found 4"]),
        (put("layers", 0, "k", 1, 3, 3), ["layers[0].k", "head 1 dim 3", "found 3"]),
        (put("layers", 0, "k", 1, 3, True), ["head 1 dim 3", "found true"]),
        (put("layers", 0, "k", 1, 3, 2.0), ["head 1 dim 3", "found 2.0"]),
        (put("layers", 0, "k", 1, 3, [2]), ["head 1 dim 3", "a list of 1"]),
        (put("layers", 0, "k", [[0] * 8] * 3), ["layers[0].k", "num_kv_heads 4", "found 3"]),
        (put("layers", 1, "v", 2, [0] * 7), ["layers[1].v[2]", "head_size 8", "found 7"]),
        (put("layers", 0, "v", 5), ["layers[0].v must be 2, 3, 4, 8, 16", "found 5"]),
        (put("layers", 0, "v", True), ["layers[0].v", "found true"]),
        (put("model", "num_heads", 6), ["num_heads", "multiple of num_kv_heads 4", "found 6"]),
        (put("model", "num_layers", 0), ["model.num_layers", "found 0"]),
        (put("model", "head_size", 12), ["model.head_size must be a multiple of 8"]),
        (put("model", "rope_theta", -1), ["model.rope_theta must be greater than 0"]),
        (put("model", "rope_theta", True), ["model.rope_theta", "found true"]),
        (put("model", "num_kv_head", 4), ["did you mean 'num_kv_heads'"]),
        (put("model", []), ["model must be a JSON object", "a list of 0"]),
        (put("provenance", "source", "x"), ["provenance.source", "'calibrated'", "found 'x'"]),
        (put("provenance", "kl", float("inf")), ["Infinity"]),
        (put("provenance", "kl", float("nan")), ["NaN"]),
        (put("provenance", "text", "x" * 9999), ["provenance.text must have at most 2048"]),
        (put("provenance", "text", "\ud800"), ["provenance.text must be a valid string"]),
    ],
)
def test_refuses_fields(change, words):
    data = copy.deepcopy(VALID)
    change(data)
    message = refusal(json.dumps(data))
    for word in words:
        assert word in message
    if "Infinity" not in message and "NaN" not in message:
        with pytest.raises(RecipeError):
            Recipe.from_dict(data)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"\xff\xfe{}", "UTF-8"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"format": 1,', "truncated"),
        (b'{"format": 1, "name": "bal', "truncated"),
        (b'{"format": 1} x', "not valid JSON"),
        (b"__import__('os')", "not valid JSON"),
        (b'{"format": 1, "format": 2}', "'format' twice"),
        (b'{"format": 1e999}', "format must be 1"),
        (b'{"format": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"format": ' + b"9" * 4000 + b"}", "a very large integer"),
        (b"[" * 1_000_000, "nested"),
        (b'{"a":' * 1_000_000, "nested"),
        (b" " * (16 << 20) + b"{}", "larger than 16 MiB"),
        (b"[" + b"1," * (8 << 20), "larger than 16 MiB"),
        (b'{"format": 1, "layers": [' + b"1," * (7 << 20) + b"1]}", "length of layers"),
        (b'{"format": 1, "model": [' + b"[]," * (2 << 20) + b"1]}", "missing"),
        (b'{"\x7f\\u2028": 1, "format": 1}', "name is missing"),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(value[:12]),
)
def test_refuses_text(text, word):
    assert word in refusal(text)


def test_duplicates_among_many_fields_are_found_quickly():
    fields = ",".join(f'"{i}":0' for i in range(200_000))
    assert "'7' twice" in refusal(f'{{{fields},"7":1}}')


def test_a_list_full_of_mistakes_is_refused_at_the_first():
    data = copy.deepcopy(VALID)
    data["layers"][0]["k"] = [["x"] * 1_000_000]
    assert "head 0 dim 0" in refusal(json.dumps(data))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("architecture", "Qwen2ForCausalLM", ["'LlamaForCausalLM'", "'Qwen2ForCausalLM'"]),
        ("num_layers", 3, ["num_layers 2", "found 3"]),
        ("head_size", 64, ["head_size 8", "found 64"]),
        ("rope_theta", 10000.0, ["rope_theta 100000.0", "found 10000.0"]),
    ],
)
def test_check_fits(field, value, words):
    recipe = Recipe.loads(json.dumps(VALID))
    recipe.check_fits(MODEL)
    with pytest.raises(RecipeError) as caught:
        recipe.check_fits(MODEL.model_copy(update={field: value}))
    for word in words:
        assert word in checked(caught.value)


@pytest.mark.parametrize("theta", [None, 100000.001])
def test_an_unknown_or_rounded_rope_base_fits(theta):
    Recipe.loads(json.dumps(VALID)).check_fits(MODEL.model_copy(update={"rope_theta": theta}))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_rank_slice(world):
    recipe = Recipe.loads(json.dumps(VALID))
    for rank in range(world):
        part = recipe.rank_slice(rank, world)
        assert Recipe.loads(part.dumps()) == part
        assert part.model.num_kv_heads == max(1, 4 // world)
        assert part.model.num_heads == 8 // world
        for layer, whole in zip(part.layers, recipe.layers, strict=True):
            first = rank * 4 // world
            heads = slice(first, first + part.model.num_kv_heads)
            assert layer.k == whole.k[heads]
            assert layer.v == (whole.v if isinstance(whole.v, int) else whole.v[heads])


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0), (0, 3), (0, 16), (0, -1)])
def test_rank_slice_refuses(rank, world):
    with pytest.raises(RecipeError) as caught:
        Recipe.loads(json.dumps(VALID)).rank_slice(rank, world)
    checked(caught.value)


def test_schema_can_be_published():
    schema = Recipe.model_json_schema()
    assert set(VALID) == set(schema["properties"])
