"""Recipes from measured statistics, and pages in the loop of a model."""

import pytest
import torch

from fourier_vllm.calibration.calibrate import Options, measured_recipe
from fourier_vllm.calibration.collect import collect
from fourier_vllm.calibration.hf_model import fingerprint_of, full_attention_layers
from fourier_vllm.evaluation.held_out import score, through_pages
from fourier_vllm.recipe import TARGETS, Provenance, Recipe, RecipeError, target_recipe
from fourier_vllm.recipe.describe import layouts, ratio_of
from tests.support.tiny import S, W, texts


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
