"""Calibration: statistics against plain float64 maths, recipes from them, and refusals."""

import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from fourier_vllm import cli
from fourier_vllm.calibration import calibrate as calibration
from fourier_vllm.calibration.calibrate import Options, measured_recipe
from fourier_vllm.calibration.collect import SEED, collect
from fourier_vllm.calibration.hf_model import fingerprint_of, full_attention_layers, model_name
from fourier_vllm.calibration.progress import Progress
from fourier_vllm.calibration.statistics import KEY_BITS, VALUE_BITS, Sums
from fourier_vllm.calibration.text import cut, read_text
from fourier_vllm.evaluation.held_out import score, through_pages
from fourier_vllm.kernels.basis import rotation
from fourier_vllm.kernels.ranges import range_share
from fourier_vllm.kernels.reference.codecs import dequantize, quantize
from fourier_vllm.recipe import TARGETS, Provenance, Recipe, RecipeError, target_recipe
from fourier_vllm.recipe.describe import layouts, ratio_of

W, M, S, L = 32, 1, 5, 40  # tokens a page, coefficients, sinks, local window
COMMON = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=97,
    max_position_embeddings=512,
)
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma3": dict(
        sliding_window=24,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    ),
}


def tiny(family):
    config_name = {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")
    config_class = getattr(transformers, config_name)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(
        config_class(**{**COMMON, **FAMILIES[family]}, attn_implementation="sdpa")
    )
    for name, parameter in model.named_parameters():
        # Away from the defaults: biases are zero and norms one.
        if parameter.dim() > 1 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(params=FAMILIES)
def model(request):
    return tiny(request.param)


@pytest.fixture
def llama():
    return tiny("Llama")


def texts(*lengths):
    g = torch.Generator().manual_seed(1)
    return [torch.randint(0, COMMON["vocab_size"], (n,), generator=g) for n in lengths]


def seen_by_eager(model, ids, seed=SEED):
    """Queries, keys and values after RoPE as eager attention receives them, `[heads, T, D]`, and the
    gradients `[Hq, T, D]` at its outputs, of the likelihood of tokens drawn for the later half."""
    found, outputs, module = {}, {}, sys.modules[type(model).__module__]
    eager = module.eager_attention_forward

    def spy(layer, query, key, value, *args, **kwargs):
        output, weights = eager(layer, query, key, value, *args, **kwargs)
        output.retain_grad()
        found[layer.layer_idx] = [x[0].detach().double() for x in (query, key, value)]
        outputs[layer.layer_idx] = output
        return output, weights

    model.set_attn_implementation("eager")
    module.eager_attention_forward = spy
    try:
        logits = model(ids[None]).logits[0, len(ids) // 2 :].float()
    finally:
        module.eager_attention_forward = eager
        model.set_attn_implementation("sdpa")
    logp = logits.log_softmax(-1)
    drawn = torch.multinomial(logp.detach().exp(), 1, generator=torch.Generator().manual_seed(seed))
    logp.gather(1, drawn).sum().backward()
    model.zero_grad()
    return {i: (*found[i], outputs[i].grad[0].transpose(0, 1).double()) for i in found}


def residuals(x):
    """Residual [P, D, W] and whether a token counts [P, 1, W], of one head [T, D], in float64."""
    t = torch.arange(W).double()
    E = torch.stack([torch.cos(math.pi / W * (t + 0.5) * j) for j in range(M)]) * (2 / W) ** 0.5
    E[0] /= 2**0.5
    pages = x[: len(x) // W * W].view(-1, W, x.shape[1]).clone()
    pages[0, :S] = pages[0, S:].mean(0)
    counts = torch.ones(len(pages), 1, W, dtype=torch.bool)
    counts[0, :, :S] = False
    pages = pages.transpose(1, 2)
    return pages - pages @ E.T @ E, counts


def coded(x, bits, share=1.0):
    return dequantize(*quantize(x.float(), bits, share)).double()


def changes(q, k, v, g, errors, scaling, of_values=False):
    """First-order change of g . output [queries, D or 1], from scratch for every query of one head."""
    found, T = [], len(k)
    for position in range(T // 2, T):
        p = (q[position] @ k[: position + 1].T * scaling).softmax(-1)
        o = p @ v[: position + 1]
        far = slice(S, max(S, (position + 1 - min(L, T // 4)) // W * W))
        if of_values:
            found.append((p[far] @ (errors[far] @ g[position]))[None])
        else:
            toward = p[far] * ((v[far] - o) @ g[position]) * scaling
            found.append(q[position] * (toward @ errors[far]))
    return torch.stack(found)


def test_statistics_are_those_of_the_text(model):
    documents = texts(150, 4 * W)
    found = collect(model, documents, W, M, S, L)
    layers = full_attention_layers(model)
    assert len(found) == len(layers)
    seen = [seen_by_eager(model, ids, SEED + i) for i, ids in enumerate(documents)]
    scaling = 32**-0.5
    for layer, statistics in list(zip(layers, found, strict=True))[::2]:
        for h in range(2):
            of_head = [(*(x[h] for x in s[layer][1:3]), s[layer]) for s in seen]
            keys = [residuals(k) for k, _, _ in of_head]
            values = [residuals(v) for _, v, _ in of_head]
            for parts, expected in (
                (keys, statistics.residual),
                (values, statistics.value_residual),
            ):
                rest, counts = (torch.cat(x) for x in zip(*parts, strict=True))
                mean = (rest.square() * counts).sum((0, 2)) / counts.sum()
                torch.testing.assert_close(expected[h], mean, rtol=1e-4, atol=1e-9)

            def mean_of(errors, of_head=of_head, h=h, of_values=False):
                total, count = 0, 0
                for (k, v, (q, _, _, g)), error in zip(of_head, errors, strict=True):
                    error = torch.cat([error, error.new_zeros(len(k) - len(error), 32)])
                    for i in (2 * h, 2 * h + 1):
                        parts = changes(q[i], k, v, g[i], error, scaling, of_values)
                        total, count = total + parts.square().sum(0), count + len(parts) / 2
                return total / count / 2

            for bits in KEY_BITS[1 - h :: 2]:
                errors = [
                    (rest - coded(rest, bits) if bits else rest).transpose(1, 2).flatten(0, 1)
                    for rest, _ in keys
                ]
                torch.testing.assert_close(
                    statistics.key_damage[bits][h],
                    mean_of(errors),
                    rtol=0.5 if bits == 8 else 0.05,  # rounding of scales shows at 8 bits
                    atol=1e-9,
                )
            R = rotation(32)
            for bits in VALUE_BITS[h::2]:
                errors = [
                    rest.transpose(1, 2).flatten(0, 1)
                    if bits == 0
                    else (v @ R - coded(v @ R, bits, range_share(bits))) @ R.T
                    for (_, v, _), (rest, _) in zip(of_head, values, strict=True)
                ]
                torch.testing.assert_close(
                    statistics.value_damage[bits][h : h + 1],
                    mean_of(errors, of_values=True),
                    rtol=0.5 if bits == 8 else 0.05,
                    atol=1e-9,
                )


def test_damage_is_the_change_of_the_output():
    """The formula against attention itself: keys without and with the error of one dim."""
    rng = torch.Generator().manual_seed(0)
    q, k, v, g = torch.randn(4, 150, 32, generator=rng).double()
    rest, _ = residuals(k)
    sums = Sums(W, M, S, L)
    sums.add(q[None], k[None], v[None], 32**-0.5, g[None])
    predicted = sums.finish().key_damage[0][0]
    rest = rest.transpose(1, 2).flatten(0, 1)
    for dim in (3, 20):
        changed = []
        for position in range(len(k) // 2, len(k)):
            far = slice(S, max(S, (position + 1 - len(k) // 4) // W * W))
            lossy = k[: position + 1].clone()
            lossy[far, dim] -= 1e-3 * rest[far, dim]
            old, new = (
                (q[position] @ x.T * 32**-0.5).softmax(-1) @ v[: position + 1]
                for x in (k[: position + 1], lossy)
            )
            changed.append(float((new - old) @ g[position]) * 1e3)
        mean = sum(x * x for x in changed) / len(changed) / 2
        assert mean == pytest.approx(float(predicted[dim]), rel=0.02)


def test_collecting_leaves_the_model_as_it_was(model):
    (ids,) = texts(150)
    with torch.inference_mode():
        before = model(ids[None]).logits
        first = collect(model, [ids], W, M, S, L)
        after = model(ids[None]).logits
    assert torch.equal(before, after)
    assert model.config._attn_implementation == "sdpa"
    second = collect(model, [ids], W, M, S, L)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.key_damage[2], b.key_damage[2])
        assert torch.equal(a.value_damage[2], b.value_damage[2])
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not model.training
    assert not model.is_gradient_checkpointing


def test_an_interrupted_run_goes_on_where_it_was(llama):
    documents, kept = texts(150, 150, 160), []
    whole = collect(llama, documents, W, M, S, L)

    def stop(done, sums):
        kept[:] = [done, [dict(x) for x in sums]]
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(llama, documents, W, M, S, L, checkpoint=stop)
    rest = collect(llama, documents, W, M, S, L, done=kept[1], num_done=kept[0])
    for a, b in zip(whole, rest, strict=True):
        assert torch.equal(a.key_damage[4], b.key_damage[4])
        assert torch.equal(a.residual, b.residual)


def test_the_hidden_states_are_exact(llama):
    (ids,) = texts(150)
    outputs = []
    llama.model.register_forward_hook(lambda *args: outputs.append(args[-1].last_hidden_state))
    collect(llama, [ids], W, M, S)
    with torch.inference_mode():
        torch.testing.assert_close(outputs[0], llama.model(ids[None]).last_hidden_state)


@pytest.mark.parametrize("target", ["quality", "balanced", "compact", "paper"])
def test_a_recipe_from_statistics(model, target):
    fingerprint = fingerprint_of(model)
    assert fingerprint.num_layers == len(full_attention_layers(model))
    options = Options(model="tiny", target=target, page_size=128, sink_tokens=8, local_window=64)
    m = TARGETS[target].coefficients(128)
    statistics = collect(model, texts(512), 128, m, 8, 64)
    for damage in (x.key_damage for x in statistics):
        assert 0 < damage[8].sum() < damage[4].sum() < damage[2].sum() < damage[0].sum()
    provenance = Provenance(source="calibrated", text="random", tokens=512)
    recipe = measured_recipe(fingerprint, statistics, options, provenance)
    assert Recipe.loads(recipe.dumps()) == recipe
    recipe.check_fits(fingerprint)
    assert (recipe.name, recipe.sink_tokens, recipe.local_window) == (target, 8, 64)
    ratio = TARGETS[target].ratio
    assert ratio is None or ratio <= ratio_of(recipe) < 1.15 * ratio
    if target == "paper":
        for layer, x in zip(recipe.layers, statistics, strict=True):
            for bits, energy in ((layer.k, x.residual), (layer.v, x.value_residual)):
                kept = torch.tensor(bits) == 16
                for keep, e in zip(kept, energy, strict=True):
                    assert keep.all() or e[keep].min() >= e[~keep].max()


def test_ranks_get_equal_bytes_on_request(llama):
    statistics = collect(llama, texts(512), 128, 4, 8)
    # One head matters more than the other.
    for x in statistics:
        for damage in x.key_damage.values():
            damage[1] *= 1000
    spent = {}
    for ranks in (1, 2, 8):
        options = Options(model="tiny", tensor_parallel_size=ranks)
        recipe = measured_recipe(
            fingerprint_of(llama), statistics, options, Provenance(source="calibrated")
        )
        spent[ranks] = [sum(row) for row in recipe.layers[0].k]
    assert spent[1][1] > spent[2][1]
    assert abs(spent[2][0] - spent[2][1]) <= 8
    assert spent[8] == spent[2]
    with pytest.raises(RecipeError, match="shards must divide 2 KV heads, found 0"):
        measured_recipe(
            fingerprint_of(llama),
            statistics,
            Options(model="tiny", tensor_parallel_size=0),
            Provenance(source="calibrated"),
        )


def test_fingerprint_is_the_engine_s(model):
    from fourier_vllm.engine import recipe_choice as recipes

    config = model.config
    seen_by_vllm = SimpleNamespace(
        hf_text_config=config,
        architectures=[type(model).__name__],
        get_total_num_kv_heads=lambda: config.num_key_value_heads,
        get_head_size=lambda: config.head_dim,
    )
    assert fingerprint_of(model) == recipes.fingerprint_of(seen_by_vllm)


def test_attention_that_cannot_be_watched(llama, monkeypatch):
    with pytest.raises(ValueError, match="at least 128 tokens, found 127"):
        collect(llama, texts(127), W, M, S)
    monkeypatch.setattr(type(llama), "set_attn_implementation", lambda *_: None)
    with pytest.raises(ValueError, match="LlamaForCausalLM does not run its attention"):
        collect(llama, texts(128), W, M, S)


@pytest.mark.parametrize("blocked", [("q_proj", "k_proj", "v_proj"), ("o_proj", "down_proj")])
def test_layers_that_pass_no_gradients(llama, blocked):
    """Quantised activations are computed without them, in front of the attention and behind it."""
    for name, module in llama.named_modules():
        if name.endswith(blocked):
            module.forward = torch.no_grad()(module.forward)
    with pytest.raises(ValueError, match=r"passes no gradients .* before its quantisation"):
        collect(llama, texts(128), W, M, S)


def test_soft_caps_are_refused():
    config = transformers.Gemma2Config(**COMMON, sliding_window=24, attn_implementation="sdpa")
    model = transformers.Gemma2ForCausalLM(config)
    with pytest.raises(ValueError, match="soft caps are not supported"):
        collect(model, texts(128), W, M, S)
    assert model.config._attn_implementation == "sdpa"


class Words:
    """A tokenizer of one token a word."""

    bos_token_id = 1

    def __init__(self, bos=True):
        self.bos = bos

    def __call__(self, text, add_special_tokens=True, **_):
        ids = [int(word) for word in text.split()]
        return SimpleNamespace(input_ids=[1] * (self.bos and add_special_tokens) + ids)


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


def test_pages_in_the_loop(llama):
    fingerprint = fingerprint_of(llama)
    context, continuation = texts(200, 20)
    lossless = target_recipe(fingerprint, "lossless", W, S, 32)
    statistics = collect(llama, [context], W, 1, S)
    crude = measured_recipe(
        fingerprint,
        statistics,
        Options(model="tiny", target="paper", page_size=W, local_window=32, sink_tokens=S),
        Provenance(source="calibrated"),
    )
    far = crude.model_copy(update={"local_window": 4096})
    exact, (same, lossy, raw) = score(llama, context, continuation, [lossless, crude, far])
    ids = torch.cat([context, continuation])
    with torch.inference_mode():
        logp = llama(ids[None]).logits[0, 199:-1].log_softmax(-1)
    expected = -logp.gather(1, continuation[:, None]).mean()
    assert exact == pytest.approx(float(expected), abs=1e-4)
    # Rounded to the 16 bits of a served model, and nothing else.
    assert same.kl < 1e-3 < lossy.kl
    assert raw == pytest.approx((exact, 0.0), abs=1e-6)


def test_what_stays_raw(llama):
    recipe = target_recipe(fingerprint_of(llama), "paper", W, S, 32)
    k, v = torch.randn(2, 2, 150, 32, generator=torch.Generator().manual_seed(0))
    found = through_pages(k, v, recipe, layouts(recipe)[0])
    for x, y in zip((k, v), found, strict=True):
        differs = (x != y).any(2).all(0)
        # 150 - 32 tokens hold three whole pages.
        assert differs.nonzero().flatten().tolist() == list(range(S, 96))


@pytest.fixture
def folder(tmp_path, monkeypatch, llama):
    monkeypatch.setattr(calibration, "load", lambda _: (llama, Words(bos=False)))
    (tmp_path / "text").write_text(" ".join(str(i * i % 97) for i in range(600)))
    return tmp_path


def calibrate(folder, *options, target="compact"):
    return cli.main(
        ["calibrate", "some/Tiny-Model", "--text", str(folder / "text"), "--page-size", "32",
         "--local-window", "32", *(["--target", target] if target else []), "--no-check", *options]
    )  # fmt: skip


def test_the_command_writes_a_recipe(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert calibrate(folder) == 0
    recipe = Recipe.load("tiny-model-compact.json")
    assert recipe.provenance.source == "calibrated"
    assert recipe.provenance.text == "text"
    assert recipe.provenance.model == "some/Tiny-Model"
    assert 500 < (recipe.provenance.tokens or 0) <= 600
    assert str(folder) not in recipe.dumps()
    assert f"{ratio_of(recipe):.2f} times smaller" in capsys.readouterr().out


def test_an_interrupted_command_goes_on(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    lengths = ["--tokens", "600", "-o", "whole.json"]
    monkeypatch.setattr(calibration, "DOCUMENT_TOKENS", 256)
    assert calibrate(folder, *lengths) == 0
    progress = folder / "r.json.progress.npz"
    save = Progress.save

    def stop(self, num_done, sums):
        save(self, num_done, sums)
        raise KeyboardInterrupt

    lengths[-1] = "r.json"
    monkeypatch.setattr(Progress, "save", stop)
    assert calibrate(folder, *lengths) == 130
    assert progress.exists()
    monkeypatch.setattr(Progress, "save", save)
    capsys.readouterr()
    assert calibrate(folder, *lengths) == 0
    assert "1 of 3 documents done" in capsys.readouterr().out
    assert not progress.exists()
    assert Recipe.load("r.json").layers == Recipe.load("whole.json").layers


@pytest.mark.parametrize("change", ["weights", "text", "sink tokens"])
def test_progress_of_another_run_is_not_mixed_in(folder, capsys, monkeypatch, llama, change):
    monkeypatch.chdir(folder)
    save, stops = Progress.save, [True]

    def stop(self, num_done, sums):
        save(self, num_done, sums)
        if stops:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "save", stop)
    options = ["-o", "r.json"]
    assert calibrate(folder, *options) == 130
    stops.clear()
    if change == "weights":
        with torch.no_grad():
            llama.model.layers[0].self_attn.k_proj.weight.mul_(2)
    elif change == "text":
        (folder / "text").write_text(" ".join(str(i * 7 % 97) for i in range(600)))
    else:
        options += ["--sink-tokens", "0"]
    assert calibrate(folder, *options) == 0
    out = capsys.readouterr().out
    assert "r.json.progress.npz is of another model, text or options: starting anew" in out
    assert "documents done" not in out
    assert calibrate(folder, *options, "-o", "anew.json") == 0
    assert Recipe.load("r.json").layers == Recipe.load("anew.json").layers


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"text", b"\x93NUMPY\x01\x00"])
def test_damaged_progress_is_named(folder, capsys, monkeypatch, content):
    monkeypatch.chdir(folder)
    Path("r.json.progress.npz").write_bytes(content)
    assert calibrate(folder, "-o", "r.json") == 1
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == (
        "fourier-vllm calibrate: progress 'r.json.progress.npz' is damaged or cannot be read: delete"
        " it to start anew."
    )
    assert Path("r.json.progress.npz").read_bytes() == content


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("name", ["r.json.progress.npz.part", ".r.json."])
def test_a_full_disk(folder, capsys, monkeypatch, name):
    """Writes of one file go where there is never any room."""
    monkeypatch.chdir(folder)
    Path("r.json").write_text("an older recipe")
    opened, real = [], Path.open

    def open_(self, mode="r", *args, **options):
        file = real(self, mode, *args, **options)
        if "w" in mode and self.name.startswith(name):
            opened.append(self)
            file.close()
            return real(Path("/dev/full"), mode, *args, **options)
        return file

    monkeypatch.setattr(Path, "open", open_)
    assert calibrate(folder, "-o", "r.json") == 1
    refusal = capsys.readouterr().err.splitlines()[-1]
    assert refusal.startswith("fourier-vllm calibrate: ")
    assert "cannot be written (No space left on device)" in refusal
    assert opened
    assert Path("r.json").read_text() == "an older recipe"
    # What was measured is kept where only the recipe could not be written.
    left = {"text", "r.json"} | ({"r.json.progress.npz"} if name == ".r.json." else set())
    assert {file.name for file in folder.iterdir()} == left


@pytest.mark.parametrize("bits", ["0", "-1", "nan", "inf", "16.5"])
def test_bits_that_make_no_sense(folder, capsys, bits):
    assert calibrate(folder, "--bits", bits, target=None) == 1
    found = f"{float(bits):g}"
    assert capsys.readouterr().err == (
        "fourier-vllm calibrate: --bits must be above 0 and at most 16, found"
        f" {found}: choose about 3.\n"
    )


@pytest.mark.parametrize(
    ("option", "found"),
    [
        ("--tokens", "0"),
        ("--local-window", "0"),
        ("--local-window", "-16"),
        ("--sink-tokens", "-1"),
        ("--sink-tokens", "129"),
        ("--tensor-parallel-size", "0"),
    ],
)
def test_counts_that_make_no_sense(capsys, option, found):
    """Refused before a model is looked for."""
    assert cli.main(["calibrate", "no-such-model", option, found]) == 1
    assert capsys.readouterr().err.startswith(f"fourier-vllm calibrate: {option} must be ")


def test_bits_instead_of_a_target(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert calibrate(folder, "--bits", "3", target="quality") == 1
    assert "--bits asks for what --target would: give one of them." in capsys.readouterr().err
    assert calibrate(folder, "--bits", "4", target=None) == 0
    recipe = Recipe.load("tiny-model-4-bits.json")
    assert recipe.name == "4-bits"
    assert 4 <= ratio_of(recipe) < 4.6


def test_what_cannot_be_met_is_said_before_anything_is_measured(folder, capsys, monkeypatch):
    monkeypatch.setattr(calibration, "collect", None)
    assert calibrate(folder, "--bits", "0.1", target=None) == 1
    refusal = capsys.readouterr().err.splitlines()[-1]
    assert "160 times was asked for: ask for less, or take larger pages." in refusal
    most, bits = re.search(r"up to ([\d.]+) times smaller \(([\d.]+) bits", refusal).groups()
    assert float(most) == pytest.approx(16 / float(bits), rel=0.01)
    assert calibrate(folder, "--tensor-parallel-size", "0") == 1
    assert "--tensor-parallel-size must be at least 1, found 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "missing"], "cannot be read \\(No such file"),
        (["--text", "binary"], "is not UTF-8 \\(at byte 0\\)"),
        (["--text", "short"], "text has 3 tokens"),
        (["--tokens", "64"], "--tokens must be at least 256"),
        (["-o", "missing/recipe.json"], "cannot be written"),
        (["-o", "."], "cannot be written"),
        (["--local-window", "3"], "--local-window must be from 16 to 65536, found 3"),
        (["--sink-tokens", "99"], "--sink-tokens must be from 0 to 32, found 99"),
    ],
)
def test_refusals_are_one_sentence(folder, capsys, monkeypatch, options, message):
    monkeypatch.chdir(folder)
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    (folder / "short").write_text("1 2 3")
    assert calibrate(folder, *options) == 1
    err = capsys.readouterr().err.splitlines()
    refusal = err[-1]
    assert refusal.startswith("fourier-vllm calibrate: ")
    with pytest.raises(ValueError, match=message):
        raise ValueError(refusal)


def test_no_such_model(tmp_path, capsys):
    assert cli.main(["calibrate", str(tmp_path), "-o", str(tmp_path / "r.json")]) == 1
    assert "cannot be loaded" in capsys.readouterr().err


def test_names_carry_no_path(tmp_path):
    assert model_name(str(tmp_path / "..") + f"/{tmp_path.name}") == tmp_path.name
    assert model_name("org/model") == "org/model"
    assert read_text(None)[0].startswith("pydoc_data.topics")


def test_inspect(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert calibrate(folder, "-o", "r.json") == 0
    capsys.readouterr()
    assert cli.main(["inspect", "r.json"]) == 0
    out = capsys.readouterr().out
    assert "compact for LlamaForCausalLM: 3 layers, 2 KV heads of 32" in out
    recipe = Recipe.load("r.json")
    lines = out.splitlines()
    assert lines[-2].split()[-1] == f"{ratio_of(recipe):.2f}"
    assert sum(page.page_bytes for page in layouts(recipe)) / W == float(lines[-2].split()[-2])
    assert "source: calibrated; model some/Tiny-Model; text text" in lines[-1]
    assert cli.main(["inspect", "missing.json"]) == 1
    assert "does not exist" in capsys.readouterr().err
