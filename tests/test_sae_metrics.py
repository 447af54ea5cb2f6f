"""Metrics against values computed by hand and against slow loops."""

import math

import pytest
import torch

from saerl_cli.activations import capture, special_ids, text_mask, token_rows
from saerl_cli.config.groups import ModelConfig, ModelKind
from saerl_cli.models import load_model, resolve_sites
from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.metrics import (
    DENSITY_EDGES,
    add,
    attribute_scores,
    auroc,
    density,
    evaluate_saes,
    max_cosine,
    reconstruction_metrics,
    reconstruction_sums,
)


def random_sae(d_in=8, d_sae=20, k=3, seed=0) -> SAE:
    g = torch.Generator().manual_seed(seed)
    sae = SAE(d_in, d_sae, "topk", k)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.5)
    return sae


def identity_sae(d: int) -> SAE:
    """Reconstructs exactly: x = relu(x) - relu(-x)."""
    sae = SAE(d, 2 * d)
    sae.W_enc.copy_(torch.cat([torch.eye(d), -torch.eye(d)], dim=1))
    sae.W_dec.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
    return sae


# --- reconstruction --------------------------------------------------------------------------------------------------


def test_reconstruction_metrics_by_hand():
    """Two tokens, x = (3, 0) and (-1, 4); features x1+ and x2+, the reconstruction loses the -1."""
    sae = SAE(2, 3)
    sae.W_enc.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    sae.b_enc.copy_(torch.tensor([0.0, 0.0, -1.0]))
    sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
    metrics = reconstruction_metrics(reconstruction_sums(sae, torch.tensor([[3.0, 0.0], [-1.0, 4.0]])))
    # mean (1, 2): variance 4 + 4 + 4 + 4 = 16, error 1
    assert metrics["fvu"] == pytest.approx(1 / 16)
    assert metrics["ev_legacy"] == pytest.approx((1 + 1 - 1 / 8) / 2)
    assert metrics["l0"] == 1.0
    assert metrics["gamma"] == pytest.approx((9 + 16) / (9 + 16))
    assert metrics["l2_ratio"] == pytest.approx((1 + 4 / math.sqrt(17)) / 2)
    assert metrics["dead_heldout"] == pytest.approx(1 / 3)
    assert metrics["firing_rate"].tolist() == [0.5, 0.5, 0.0]
    assert metrics["tokens_heldout"] == 2


def test_batches_are_pooled_and_not_averaged():
    sae, x = random_sae(), 5 + torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    x[:50] *= 4
    whole, parts = reconstruction_sums(sae, x), {}
    for part in (x[:50], x[50:60], x[60:]):
        add(parts, reconstruction_sums(sae, part))
    pooled, reference = reconstruction_metrics(parts), reconstruction_metrics(whole)
    for key in ("fvu", "l0", "gamma", "l2_ratio", "dead_heldout"):
        assert pooled[key] == pytest.approx(reference[key], rel=1e-9)


def test_fvu_is_independent_of_scale_and_punishes_an_offset():
    sae, x = identity_sae(6), torch.randn(200, 6, generator=torch.Generator().manual_seed(2))
    offset = identity_sae(6)
    offset.b_dec.copy_(torch.ones(6))
    offset.b_enc.copy_(offset.b_dec @ offset.W_enc)  # encodes x as before, then adds 1 to the reconstruction
    exact = reconstruction_metrics(reconstruction_sums(sae, x))["fvu"]
    shifted = [reconstruction_metrics(reconstruction_sums(offset, x))["fvu"]]
    assert exact < 1e-12
    assert shifted[0] == pytest.approx(1 / float(x.var(0, correction=0).mean()), rel=1e-4)
    half = identity_sae(6)
    half.W_dec.mul_(0.5)
    values = [reconstruction_metrics(reconstruction_sums(half, scale * x))["fvu"] for scale in (1.0, 1000.0)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert reconstruction_metrics(reconstruction_sums(half, x))["gamma"] == pytest.approx(0.5)


def test_sums_stay_exact_far_from_the_origin():
    x = 3000 + torch.randn(500, 4, generator=torch.Generator().manual_seed(3))
    sae = SAE(4, 2)
    sae.b_dec.copy_(x.mean(0))  # predicts the mean: FVU 1
    assert reconstruction_metrics(reconstruction_sums(sae, x))["fvu"] == pytest.approx(1.0, abs=1e-3)


def test_density_counts_features_by_the_logarithm_of_their_rate():
    result = density(torch.tensor([0.0, 1e-9, 0.02, 0.9, 1.0]))
    assert result["log10_edges"] == DENSITY_EDGES
    assert sum(result["features"]) == 4
    assert result["features"][0] == 1 and result["features"][-1] == 2
    assert result["features"][DENSITY_EDGES.index(-2.0)] == 1


# --- the language model's loss ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tiny_world_model):
    return load_model(ModelConfig(kind=ModelKind.local, path=str(tiny_world_model)))


@pytest.fixture(scope="module")
def rows(loaded):
    words = list(loaded.tokenizer.get_vocab())[5:200]
    texts = [" ".join(words[i : i + 7]) for i in range(0, 180, 6)]
    return token_rows(texts, loaded.tokenizer, 24)


def test_an_exact_sae_loses_nothing(loaded, rows):
    sites = resolve_sites(["mlp_out.1", "attn_out.1"], loaded.model)
    saes = {site.name: identity_sae(site.width) for site in sites}
    for metrics in evaluate_saes(loaded.model, sites, saes, rows, special_ids(loaded.tokenizer)).values():
        assert metrics["fvu"] < 1e-9
        assert metrics["ce_spliced"] == pytest.approx(metrics["ce_base"], abs=1e-6)
        assert metrics["ce_recovered"] == pytest.approx(1, abs=1e-3)
        assert metrics["kl_spliced"] == pytest.approx(0, abs=1e-6)
        assert abs(metrics["ce_zero"] - metrics["ce_base"]) > 1e-3


def test_losses_equal_a_slow_loop(loaded, rows):
    """One row at a time, splices written out by hand; special tokens keep their activation and are not predicted."""
    special = special_ids(loaded.tokenizer)
    sites = resolve_sites(["mlp_out.1"], loaded.model)
    sae = random_sae(d_in=sites[0].width)
    metrics = evaluate_saes(loaded.model, sites, {"mlp_out.1": sae}, rows, special)["mlp_out.1"]
    text = text_mask(rows, special)
    mean = capture(loaded.model, sites, rows)["mlp_out.1"][text].mean(0)
    replacements = {"base": lambda x: x, "spliced": sae, "zero": torch.zeros_like, "mean": lambda x: mean.expand_as(x)}
    losses = {name: [] for name in replacements}
    divergence = []
    module = loaded.model.get_submodule(sites[0].module)
    for row, kept in zip(rows, text, strict=True):
        logps = {}
        for name, replacement in replacements.items():

            def splice(m, a, x, replacement=replacement, kept=kept):
                new = x.clone()
                new[0, kept] = replacement(x[0, kept])
                return new

            hook = module.register_forward_hook(splice)
            logps[name] = loaded.model(row[None]).logits[0].double().log_softmax(-1)
            hook.remove()
        for t in range(len(row) - 1):
            if kept[t + 1]:
                for name, logp in logps.items():
                    losses[name].append(-float(logp[t, row[t + 1]]))
                base = logps["base"][t]
                divergence.append(float((base.exp() * (base - logps["spliced"][t])).sum()))
    expected = {name: sum(values) / len(values) for name, values in losses.items()}
    for name, value in expected.items():
        assert metrics[f"ce_{name}"] == pytest.approx(value, abs=1e-5)
    ratio = (expected["zero"] - expected["spliced"]) / (expected["zero"] - expected["base"])
    assert metrics["ce_recovered"] == pytest.approx(ratio, rel=1e-3)
    assert metrics["kl_spliced"] == pytest.approx(sum(divergence) / len(divergence), abs=1e-5)


def test_processes_add_up(loaded, rows):
    """Two processes' sums, added, are those of one: evaluated here one after the other with a recording reduction."""
    sites = resolve_sites(["mlp_out.1"], loaded.model)
    saes, special = {"mlp_out.1": random_sae(sites[0].width)}, special_ids(loaded.tokenizer)
    whole = reconstruction_metrics(
        reconstruction_sums(
            saes["mlp_out.1"], capture(loaded.model, sites, rows)["mlp_out.1"][text_mask(rows, special)]
        )
    )
    parts = {}
    for share in (rows[0::2], rows[1::2]):
        x = capture(loaded.model, sites, share)["mlp_out.1"][text_mask(share, special)]
        add(parts, reconstruction_sums(saes["mlp_out.1"], x))
    assert reconstruction_metrics(parts)["fvu"] == pytest.approx(whole["fvu"], rel=1e-6)


# --- planted truth ---------------------------------------------------------------------------------------------------


def test_auroc_equals_counting_pairs():
    g = torch.Generator().manual_seed(4)
    score = torch.randint(0, 6, (80,), generator=g).float()  # many ties
    positive = torch.rand(80, generator=g) < 0.3
    pairs = [(float(a > b) + 0.5 * float(a == b)) for a in score[positive] for b in score[~positive]]
    assert auroc(score, positive) == pytest.approx(sum(pairs) / len(pairs))


def test_the_feature_that_detects_an_attribute_is_found():
    labels = torch.tensor([[1, 0], [1, 0], [0, 0], [0, 0], [1, 0]], dtype=torch.bool)
    f = torch.tensor([[1.0, 0, 5], [1, 0, 4], [1, 2, 0], [0, 0, 1], [0, 0, 0]])
    scores = attribute_scores(f, labels, ["cursing", "never"])
    # feature 0: 2 hits of 3 fired, 3 true: F1 4/6; feature 2 the same; the first is taken
    assert scores == {
        "cursing": {"feature": 0, "f1": pytest.approx(4 / 6), "auroc": pytest.approx(3.5 / 6), "tokens": 3}
    }


def test_max_cosine_by_hand(monkeypatch):
    """Directions at 0, 60 and 180 degrees, of any length: the best partners are at cosines 1/2, 1/2 and -1/2."""
    decoder = torch.tensor([[2.0, 0.0], [0.5, 0.75**0.5], [-3.0, 0.0]])
    assert max_cosine(decoder) == pytest.approx(0.5 / 3)
    monkeypatch.setattr("saerl_cli.sae.metrics.COSINES_AT_ONCE", 2)
    assert max_cosine(decoder) == pytest.approx(0.5 / 3)
