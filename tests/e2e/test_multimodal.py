"""Qwen2-VL: lossless pages give stock attention's tokens, and pages know which image they saw."""

from __future__ import annotations

import importlib.util

import pytest

from tests.support.images import IMAGE_TOKENS, PAGE, TEXT


@pytest.fixture(scope="module")
def results(root, run_apart, tmp_path_factory):
    """Answers of stock attention, of lossless pages and of pages derived from the weights."""
    there = importlib.util.find_spec("torchvision") is not None
    path = [] if there else [root / "tests/support/stand_ins"]
    return run_apart("tests.support.images", tmp_path_factory.mktemp("images"), *path)


def test_tokens_and_hits_equal_stock(results):
    assert results["lossless"] == results["stock"]


def test_pages_know_their_image(results):
    """Of a picture that was not there before only the text's page in front of it is found."""
    whole = (sum(TEXT) + 2 + IMAGE_TOKENS - 1) // PAGE * PAGE
    hits = [hit for _, hit in results["lossless"]]
    assert hits[:5] == [0, PAGE, whole, whole, PAGE]
    tokens = [answer for answer, _ in results["lossless"]]
    assert tokens[0] == tokens[2] != tokens[1] == tokens[3]


def test_recipe_from_the_weights(results):
    """Answers of another quality, and the same hits."""
    assert [hit for _, hit in results["derived"]] == [hit for _, hit in results["stock"]]
    assert results["derived"] != results["stock"]
