"""Evaluation end to end on tiny random models: sessions, whole runs, resuming and refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from fourier_vllm import cli
from fourier_vllm.calibration.hf_model import fingerprint_of, full_attention_layers
from fourier_vllm.evaluation import evaluate as evaluation
from fourier_vllm.evaluation.contexts import prefills
from fourier_vllm.evaluation.evaluate import evaluate, on_device
from fourier_vllm.evaluation.formats import COMPARATORS
from fourier_vllm.evaluation.options import Options, check
from fourier_vllm.evaluation.results import Rows
from fourier_vllm.evaluation.session import CodecSession, fork, hold, prefill, stack
from fourier_vllm.evaluation.tasks import TASKS
from fourier_vllm.recipe import target_recipe
from tests.support.numerics import assert_close

CONTEXT = 900
SINKS, END = 16, 640  # of the lossless recipe below


def tiny(family: str = "Llama"):
    """A random model; Gemma 3 mixes sliding-window and full layers."""
    extra = dict(sliding_window=24, layer_types=["sliding_attention", "full_attention"])
    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config"))
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(
        config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            vocab_size=128,
            max_position_embeddings=2048,
            attn_implementation="sdpa",
            **(extra if family == "Gemma3" else {}),
        )
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


class Characters:
    """A tokenizer whose tokens are ASCII characters."""

    bos_token_id = 0

    def __call__(self, text: str, **options: object) -> SimpleNamespace:
        ids = [min(ord(c), 127) for c in text]
        return SimpleNamespace(input_ids=ids if options.get("add_special_tokens") is False else [0])

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch):
    model = tiny()
    monkeypatch.setattr(evaluation, "load", lambda name: (model, Characters()))
    return model


def options_of(tmp_path: Path, **changes) -> Options:
    defaults = dict(
        compare=["all"], context=CONTEXT, documents=1, questions=4, out=tmp_path / "out"
    )
    return Options("tiny", **(defaults | changes))


IDS = torch.randint(0, 128, (700,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma3"])
def test_session_is_the_model(family: str) -> None:
    """Log-probabilities after the exact cache are those of one forward pass without a cache."""
    model = tiny(family)
    session = CodecSession(model, stack([prefill(model, IDS[:600])] * 2), 600)
    with torch.inference_mode():
        want = model(torch.tensor([IDS[:640]])).logits[0, 619:639].log_softmax(-1)
    for _ in range(2):  # a question leaves no trace
        rows = list(session.score(IDS[600:620], IDS[620:640]))
        assert len(rows) == 2
        for row in rows:
            assert_close("log-probabilities", want, row.vocabulary, 1e-4)


@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_generation_is_the_models(family: str) -> None:
    model = tiny(family)
    session = CodecSession(model, prefill(model, IDS[:600]), 600)
    want = IDS[:605]
    with torch.inference_mode():
        for _ in range(12):
            want = [*want, int(model(torch.tensor([want])).logits[0, -1].argmax())]
    assert session.generate(IDS[600:605], 12) == [want[605:]]


@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_dropped_tokens_keep_positions(family: str) -> None:
    """StreamingLLM is full attention under a mask that hides the middle."""
    model = tiny(family)
    layers = full_attention_layers(model)
    exact = prefill(model, IDS[:600])
    form = COMPARATORS["streaming"](fingerprint_of(model))
    dropped, bits = hold(exact, form, layers, 16, 512)
    assert bits == 0
    assert dropped.layers[layers[0]].keys.shape[2] == 600 - (512 - 16)
    assert exact.layers[layers[0]].keys.shape[2] == 600
    (got,) = CodecSession(model, dropped, 600).score(IDS[600:620], IDS[620:640])

    hidden = fork(exact)
    for i in layers:
        layer = hidden.layers[i]
        layer.values = layer.values.clone()
    sees = torch.ones(39, 639, dtype=torch.bool).tril(600)
    sees[:, 16:512] = False
    mask: object = sees[None, None]
    if family == "Gemma3":
        near = torch.ones(39, 24 - 1 + 39, dtype=torch.bool).tril(24 - 1).triu()
        mask = {"full_attention": mask, "sliding_attention": near[None, None]}
    with torch.inference_mode():
        logits = model(
            torch.tensor([IDS[600:639]]), past_key_values=hidden, attention_mask=mask
        ).logits
    assert_close("log-probabilities", logits[0, 19:].log_softmax(-1), got.vocabulary, 1e-4)


def test_values_that_are_not_finite_are_refused() -> None:
    model = tiny()

    class Broken:
        name = family = "broken"

        def hold(self, k, v, start, layer):
            return COMPARATORS["exact"](fingerprint_of(model)).hold(k * torch.nan, v, start, layer)

    with pytest.raises(ValueError, match="broken gives values that are not finite in layer 0"):
        hold(prefill(model, IDS[:100]), Broken(), [0, 1], 16, 64)


def test_a_whole_run(llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["fourier_vllm.evaluation.tasks.nll"], "SCORED_TOKENS", 40)
    recipe = target_recipe(fingerprint_of(llama), "lossless")
    recipe.save(tmp_path / "lossless.json")
    calls = []
    monkeypatch.setattr(
        evaluation, "prefill", lambda model, ids: calls.append(len(ids)) or prefill(model, ids)
    )
    options = options_of(tmp_path, recipes=[tmp_path / "lossless.json"])
    check(options)
    data = evaluate(options)
    assert len(calls) == prefills(options) == 5  # once a context, however many formats
    assert max(calls) == CONTEXT
    rows = {row["name"]: row for row in data["rows"]}
    assert list(rows)[:2] == ["exact", "lossless"]
    assert set(rows) == {"lossless", *COMPARATORS}
    assert data["settings"]["start"] == SINKS
    assert data["settings"]["end"] == END
    exact = rows["exact"]["tasks"]
    assert exact["nll"]["kl"] == 0
    assert exact["agreement"] == {"same": 1.0, "prefix": 256.0}
    assert len(rows["kivi2"]["samples"]["tasks"]["multikey"]["right"]) == 4
    for task in TASKS:
        assert rows["paper"]["tasks"][task].keys() == exact[task].keys()
    # bfloat16 pages of a float32 model: close to exact, and much closer than dropping tokens
    assert (
        0 < rows["lossless"]["tasks"]["nll"]["kl"] < 0.02 * rows["streaming"]["tasks"]["nll"]["kl"]
    )
    assert rows["kivi4"]["tasks"]["nll"]["kl"] < rows["kivi2"]["tasks"]["nll"]["kl"]
    assert rows["streaming"]["ratio"] is None
    assert data == json.loads((tmp_path / "out/results.json").read_text())


def test_a_run_goes_on_where_it_stopped(llama, tmp_path: Path, monkeypatch) -> None:
    def run(out: str, count: int = 3) -> dict:
        options = options_of(
            tmp_path, documents=count, tasks=["needle"], compare=["kivi2"], out=tmp_path / out
        )
        check(options)
        return evaluate(options)

    want, real = run("at-once"), evaluation.measure
    seen: list[Any] = []

    def stops(*args) -> None:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(0)
        real(*args)

    monkeypatch.setattr(evaluation, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        run("in-two")
    assert json.loads((tmp_path / "in-two/results.json").read_text())["documents_done"] == 2
    seen.clear()
    got = run("in-two")
    assert len(seen) == 1
    assert got["rows"] == want["rows"]
    assert got["documents_done"] == 3


def test_same_seed_same_numbers(llama, tmp_path: Path) -> None:
    runs = [
        evaluate(
            options_of(
                tmp_path, tasks=["multivalue"], compare=["fp8"], seed=seed, out=tmp_path / f"{i}"
            )
        )
        for i, seed in enumerate((1, 1, 2))
        if (tmp_path / f"{i}").mkdir() is None
    ]
    assert runs[0]["rows"] == runs[1]["rows"]
    assert runs[0]["rows"] != runs[2]["rows"]


def test_small_stacks_give_the_same(llama, tmp_path: Path, monkeypatch) -> None:
    """However few caches fit, every format is compared with the same exact answers."""
    (tmp_path / "out").mkdir()
    options = options_of(tmp_path, tasks=["agreement"], compare=["kivi4", "kivi2", "streaming"])
    want = evaluate(options)["rows"]
    monkeypatch.setattr(evaluation, "STACK_BYTES", 1)
    assert evaluate(options)["rows"] == want


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tasks=["nlll"]), "--tasks has 'nlll', which is unknown: did you mean 'nll'"),
        (dict(questions=25), "--questions must be 1 to 24, found 25"),
        (dict(documents=0), "--documents must be 1 to"),
        (dict(context=0), "--context must be 1 to"),
        (dict(context=1500), "--context must be at most 1408 for this model of 2048 tokens"),
        (dict(context=300), "--context must be at least 384 for"),
        (dict(text=[Path("a.txt")], documents=2), "--text has 1 files for --documents 2"),
        (dict(text=[Path("absent.txt")]), "cannot be read"),
        (dict(text=[Path("a.txt")]), "give longer files to --text"),
        (dict(text=[Path("a.txt")], tasks=["needle"]), "give longer files to --text"),
        (dict(text=[Path("solid.txt")], tasks=["needle"]), "no line or sentence end"),
        (dict(tasks=["multikey"], questions=24), "cannot hold 24 needles"),
        (dict(out=Path("a.txt")), "--out 'a.txt' cannot be made"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(changes: dict, message: str, llama, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("short\n")
    Path("solid.txt").write_text("x" * 4000)
    options = options_of(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as refusal:  # noqa: PT012
        check(options)
        evaluate(options)
    assert "\n" not in str(refusal.value)


def test_out_of_memory(llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(evaluation, "measure", full)
    with pytest.raises(ValueError, match="out of memory: choose a smaller --context"):
        evaluation.run(options_of(tmp_path))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("name", [".results.json.", "results.md", "needle.png"])
def test_a_full_disk(llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if name.startswith("."):
        real = Path.open

        def open_(self, *args, **options):
            file = Path("/dev/full") if self.name.startswith(name) else self
            return real(file, *args, **options)

        monkeypatch.setattr(Path, "open", open_)
    else:
        pytest.importorskip("matplotlib")
        (out / name).symlink_to("/dev/full")
    options = options_of(tmp_path, tasks=["needle"], compare=["fp8"])
    with pytest.raises(ValueError, match=r"cannot be written \(No space left on device\)"):
        evaluation.run(options)
    assert (out / "results.json").exists() == (not name.startswith("."))


def test_a_changed_recipe_starts_anew(llama, tmp_path: Path) -> None:
    recipe = target_recipe(fingerprint_of(llama), "lossless")
    recipe.save(tmp_path / "r.json")
    options = options_of(
        tmp_path, recipes=[tmp_path / "r.json"], tasks=["needle"], compare=["none"]
    )
    check(options)
    data = evaluate(options)
    assert data["recipes"]["r"]["source"] == "manual"
    data["settings"] |= {"documents": 2}  # as if it had been interrupted
    file = tmp_path / "out/results.json"
    file.write_text(json.dumps(data))
    rows = Rows({"exact": "exact", "r": "fourier"})
    assert evaluation.resume(file, data, rows)[0] == 1
    assert len(rows.bits["r"]) == 1
    other = data | {"recipes": {"r": {"sha256": "another"}}}
    assert evaluation.resume(file, other, rows) == (0, 0.0)


def test_unknown_device() -> None:
    with pytest.raises(ValueError, match=r"--device 'warp' cannot be used .*: choose cpu, cuda"):
        on_device(tiny(), "warp")


def test_command(llama, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    arguments = ["eval", "tiny", "--tasks", "needle", "--compare", "kivi4,fp8", "--out", out]
    assert cli.main([*arguments, "--context", "900", "--documents", "1", "--device", "cpu"]) == 0
    assert "| `kivi4` | 5.26 | 3.04x |" in capsys.readouterr().out  # heads of 16: V pays 32 / 16
    assert cli.main([*arguments, "--context", "3"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("fourier-vllm eval: --context must be at least")
    assert err.count("\n") == 1
