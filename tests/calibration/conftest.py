"""Tiny models, and a folder to calibrate one in."""

import pytest

from fourier_vllm.calibration import calibrate as calibration
from tests.support.tiny import FAMILIES, Words, tiny


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny(request.param)


@pytest.fixture
def llama():
    return tiny("Llama")


@pytest.fixture
def folder(tmp_path, monkeypatch, llama):
    monkeypatch.setattr(calibration, "load", lambda _: (llama, Words(bos=False)))
    (tmp_path / "text").write_text(" ".join(str(i * i % 97) for i in range(600)))
    return tmp_path
