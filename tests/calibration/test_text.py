"""Documents cut from a text, and names without paths."""

import pytest

from fourier_vllm.calibration.hf_model import model_name
from fourier_vllm.calibration.text import cut, read_text
from tests.support.tiny import Words


def test_documents_are_spread_over_the_text():
    text = " ".join(map(str, range(1000)))
    found = cut(Words(bos=False), text, 600, 32, 300)
    assert [x.tolist() for x in found] == [list(range(300)), list(range(500, 800))]
    found = cut(Words(), text, 10**6, 32, 300)
    assert [len(x) for x in found] == [250] * 4
    assert all(x[0] == 1 for x in found)
    assert found[3][-1] == 998
    for few, kwargs, message in (
        (200, {}, "text has 200 tokens, and pages of 32 need 256"),
        (1000, {"tokens": 100}, "--tokens must be at least 256 tokens"),
        (1000, {"longest": 100}, "the model's context must be at least 256 tokens"),
    ):
        options = {"tokens": 600, "page_size": 32, "longest": 300} | kwargs
        with pytest.raises(ValueError, match=message):
            cut(Words(), " ".join(map(str, range(few))), **options)


def test_names_carry_no_path(tmp_path):
    assert model_name(str(tmp_path / "..") + f"/{tmp_path.name}") == tmp_path.name
    assert model_name("org/model") == "org/model"
    assert read_text(None)[0].startswith("pydoc_data.topics")
