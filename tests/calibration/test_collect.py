"""Calibration: statistics against plain float64 maths."""

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from fourier_vllm.calibration.collect import SEED, collect
from fourier_vllm.calibration.hf_model import fingerprint_of, full_attention_layers
from fourier_vllm.calibration.statistics import KEY_BITS, VALUE_BITS, Sums
from fourier_vllm.kernels.basis import rotation
from fourier_vllm.kernels.ranges import range_share
from fourier_vllm.kernels.reference.codecs import dequantize, quantize
from tests.support.tiny import COMMON, L, M, S, W, texts


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
    documents = texts(150, 150, 160)
    kept: list[Any] = []
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
