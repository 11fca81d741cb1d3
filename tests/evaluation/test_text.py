"""Evaluation text is there on a Python as distributions pack it, and a missing module is named."""

import subprocess
import sys

import pytest

from fourier_vllm.evaluation import text


def test_manuals_need_no_tkinter():
    code = (
        "import sys; sys.modules['tkinter'] = None\n"
        "from fourier_vllm.evaluation.text import MODULES, manual\n"
        "assert all(len(manual(name)) > 500 for name in MODULES)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_module_is_named(monkeypatch):
    monkeypatch.setattr(text, "MODULES", ("json", "no_such_module"))
    with pytest.raises(
        ValueError, match=r"no_such_module cannot be imported here .*: use a Python"
    ):
        text.documents(1, 10**6)
