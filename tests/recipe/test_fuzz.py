"""Any text is a recipe or refused in one sentence; any recipe survives a round trip."""

import copy
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from fourier_vllm.recipe import (
    LayerRecipe,
    Provenance,
    Recipe,
    RecipeError,
)
from tests.support.recipes import MODEL, VALID, checked


def loads_or_refuses(text) -> None:
    try:
        recipe = Recipe.loads(text)
    except RecipeError as error:
        checked(error)
    else:
        assert Recipe.loads(recipe.dumps()) == recipe
        recipe.rank_slice(0, 1).check_fits(recipe.model)


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_any_text(text):
    loads_or_refuses(text)


@given(st.data())
@settings(max_examples=200)
def test_mutated_bytes(data):
    text = bytearray(Recipe.loads(json.dumps(VALID)).dumps().encode())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 20)))
        text[start:end] = data.draw(st.binary(max_size=8) | st.sampled_from([b"0", b"1e9", b"["]))
    loads_or_refuses(bytes(text))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32, 64, 128, 10**400])
    | st.floats()
    | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)


@given(st.data())
@settings(max_examples=300)
def test_mutated_values(data):
    document = copy.deepcopy(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        node = document
        while True:
            key = data.draw(
                st.sampled_from(list(node) if isinstance(node, dict) else range(len(node)))
            )
            if (
                not isinstance(node[key], (dict, list))
                or not node[key]
                or not data.draw(st.integers(0, 4))
            ):
                break
            node = node[key]
        node[key] = data.draw(JSON)
    loads_or_refuses(json.dumps(document))


@given(
    st.builds(
        Provenance,
        source=st.sampled_from(["calibrated", "weights", "manual"]),
        text=st.none() | st.text(max_size=20),
        tokens=st.none() | st.integers(0, 1 << 62),
        kl=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    ),
    st.lists(
        st.lists(st.sampled_from([0, 2, 4, 8, 16]), min_size=8, max_size=8), min_size=4, max_size=4
    ),
    st.sampled_from([2, 3, 4, 8, 16]),
    st.sampled_from([32, 64, 128, 256]),
)
def test_any_recipe_survives_a_round_trip(provenance, k, v, page_size):
    recipe = Recipe(
        name="x",
        model=MODEL,
        page_size=page_size,
        coefficients=page_size,
        layers=(LayerRecipe(k=k, v=v), LayerRecipe(k=k, v=k)),
        provenance=provenance,
    )
    assert Recipe.loads(recipe.dumps()) == recipe
