"""Metrics against values computed by hand and against slow loops."""

import copy
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from saerl_cli.activations import capture, special_ids, text_mask, token_rows
from saerl_cli.config.groups import ModelConfig, ModelKind
from saerl_cli.models import load_model, resolve_sites
from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.jackknife import by_row, jackknife, joined
from saerl_cli.sae.metrics import (
    DENSITY_EDGES,
    attribute_scores,
    auroc,
    density,
    evaluate_saes,
    firing,
    geometry,
    max_cosine,
    rare_cluster,
    reconstruction_statistics,
    token_values,
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


def measured(sae: SAE, x: torch.Tensor, y: torch.Tensor | None = None, row: torch.Tensor | None = None) -> dict:
    """Metrics of tokens, all of one row unless told."""
    row = torch.zeros(len(x), dtype=torch.long) if row is None else row
    values, fired = token_values(sae, x, y)
    numbers = jackknife(by_row(values, row, int(row.max()) + 1), reconstruction_statistics)
    return numbers | firing(fired / len(x), sae)


# --- reconstruction --------------------------------------------------------------------------------------------------


def test_reconstruction_metrics_by_hand():
    """Two tokens, x = (3, 0) and (-1, 4); features x1+ and x2+, the reconstruction loses the -1."""
    sae = SAE(2, 3)
    sae.W_enc.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    sae.b_enc.copy_(torch.tensor([0.0, 0.0, -1.0]))
    sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
    metrics = measured(sae, torch.tensor([[3.0, 0.0], [-1.0, 4.0]]))
    # mean (1, 2): variance 4 + 4 + 4 + 4 = 16, error 1
    assert metrics["fvu"] == pytest.approx(1 / 16)
    assert metrics["ev_legacy"] == pytest.approx((1 + 1 - 1 / 8) / 2)
    assert metrics["l0"] == 1.0
    assert metrics["gamma"] == pytest.approx((9 + 16) / (9 + 16))
    assert metrics["l2_ratio"] == pytest.approx((1 + 4 / math.sqrt(17)) / 2)
    assert metrics["dead_heldout"] == pytest.approx(1 / 3)
    assert metrics["firing_rate"].tolist() == [0.5, 0.5, 0.0]
    assert metrics["cosine"] == pytest.approx((1 + 4 / math.sqrt(17)) / 2)
    assert "fvu_se" not in metrics  # a single row has no standard error


def test_batches_are_pooled_and_not_averaged():
    sae, x = random_sae(), 5 + torch.randn(300, 8, generator=torch.Generator().manual_seed(1))
    x[:50] *= 4
    row = torch.arange(300) // 50
    parts = [by_row(token_values(sae, x[row == r])[0], row[row == r] - r, 1) for r in range(6)]
    together, reference = jackknife(joined(parts), reconstruction_statistics), measured(sae, x, row=row)
    for key in ("fvu", "fvu_se", "l0", "l0_se", "gamma", "l2_ratio"):
        assert together[key] == pytest.approx(reference[key], rel=1e-9)
    per_batch = sum(measured(sae, x[row == r])["fvu"] for r in range(6)) / 6
    assert abs(per_batch - reference["fvu"]) > 0.01  # the mean of batches is another number


def test_fvu_is_independent_of_scale_and_punishes_an_offset():
    sae, x = identity_sae(6), torch.randn(200, 6, generator=torch.Generator().manual_seed(2))
    offset = identity_sae(6)
    offset.b_dec.copy_(torch.ones(6))
    offset.b_enc.copy_(offset.b_dec @ offset.W_enc)  # encodes x as before, then adds 1 to the reconstruction
    exact = measured(sae, x)["fvu"]
    shifted = [measured(offset, x)["fvu"]]
    assert exact < 1e-12
    assert shifted[0] == pytest.approx(1 / float(x.var(0, correction=0).mean()), rel=1e-4)
    half = identity_sae(6)
    half.W_dec.mul_(0.5)
    values = [measured(half, scale * x)["fvu"] for scale in (1.0, 1000.0)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert measured(half, x)["gamma"] == pytest.approx(0.5)


def test_sums_stay_exact_far_from_the_origin():
    x = 3000 + torch.randn(500, 4, generator=torch.Generator().manual_seed(3))
    sae = SAE(4, 2)
    sae.b_dec.copy_(x.mean(0))  # predicts the mean: FVU 1
    assert measured(sae, x)["fvu"] == pytest.approx(1.0, abs=1e-3)


def test_density_counts_features_by_the_logarithm_of_their_rate():
    result = density(torch.tensor([0.0, 1e-9, 0.02, 0.9, 1.0]))
    assert result["log10_edges"] == DENSITY_EDGES
    assert sum(result["features"]) == 4
    assert result["features"][0] == 1 and result["features"][-1] == 2
    assert result["features"][DENSITY_EDGES.index(-2.0)] == 1


# --- the language model's loss ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tiny_planted_model):
    return load_model(ModelConfig(kind=ModelKind.local, path=str(tiny_planted_model)))


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


@pytest.mark.parametrize("count", [1, 7])
def test_processes_add_up(loaded, rows, count):
    """Two processes give the numbers of one: threads whose reductions wait for each other. One may have no row."""
    rows = rows[:count]
    sites = resolve_sites(["mlp_out.1"], loaded.model)
    saes, special = {"mlp_out.1": random_sae(sites[0].width)}, special_ids(loaded.tokenizer)
    whole = evaluate_saes(loaded.model, sites, saes, rows, special)["mlp_out.1"]
    barrier, shares = threading.Barrier(2, timeout=60), [None, None]

    def process(rank: int) -> dict:
        def reduce(tensor: torch.Tensor) -> torch.Tensor:
            shares[rank] = tensor
            barrier.wait()
            total = shares[0] + shares[1]
            barrier.wait()
            return total

        with torch.no_grad():
            return evaluate_saes(copies[rank], sites, saes, rows[rank::2], special, reduce)["mlp_out.1"]

    copies = [copy.deepcopy(loaded.model) for _ in range(2)]  # hooks of two threads must not meet
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(process, range(2)):
            assert set(found) == set(whole)
            for key in {"fvu", "l0", "ce_recovered", "dead_heldout", *(k for k in whole if k.endswith("_se"))}:
                if key != "ev_legacy_se":  # depends on the batches
                    assert found[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-7), key
            assert found["tokens_heldout"] == whole["tokens_heldout"]


# --- standard errors -------------------------------------------------------------------------------------------------


def test_standard_errors_equal_deleting_one_row_at_a_time(loaded, rows):
    """Every metric with an error: the whole evaluation repeated without each row."""
    sites, special = resolve_sites(["mlp_out.1"], loaded.model), special_ids(loaded.tokenizer)
    saes, rows = {"mlp_out.1": random_sae(sites[0].width)}, rows[:6]
    numbers = evaluate_saes(loaded.model, sites, saes, rows, special)["mlp_out.1"]
    without = [
        evaluate_saes(loaded.model, sites, saes, rows[torch.arange(6) != r], special)["mlp_out.1"] for r in range(6)
    ]
    names = [key.removesuffix("_se") for key in numbers if key.endswith("_se")]
    assert {"fvu", "l0", "gamma", "cosine", "ce_base", "ce_recovered", "kl_spliced", "kl_recovered"} < set(names)
    for name in set(names) - {"ce_mean", "ev_legacy"}:  # whose means, of the set and of the batch, would change too
        values = torch.tensor([w[name] for w in without], dtype=torch.float64)
        expected = (5 / 6 * (values - values.mean()).square().sum()).sqrt()
        assert numbers[f"{name}_se"] == pytest.approx(float(expected), rel=1e-4, abs=1e-9), name


def test_the_jackknife_of_a_mean_is_the_textbook_error_and_sees_dependence():
    g = torch.Generator().manual_seed(5)
    value = torch.randn(40, generator=g).double()
    rows = {"n": torch.ones(40).double(), "v": value}
    mean = lambda s: {"m": s["v"] / s["n"]}  # noqa: E731
    assert jackknife(rows, mean)["m_se"] == pytest.approx(float(value.std() / 40**0.5))
    repeated = {"n": 9 * rows["n"], "v": 9 * rows["v"]}  # nine tokens a row, all alike: no more is known
    assert jackknife(repeated, mean)["m_se"] == pytest.approx(jackknife(rows, mean)["m_se"])
    empty = {name: torch.cat([v, torch.zeros(7).double()]) for name, v in rows.items()}
    assert jackknife(empty, mean) == pytest.approx(jackknife(rows, mean))


# --- features --------------------------------------------------------------------------------------------------------


def test_firing_shares_and_the_rare_cluster_by_hand():
    sae = SAE(2, 5)
    sae.W_enc.copy_(torch.tensor([[1.0, 1.0, 2.0, 0.0, 1.0], [0.0, 0.1, 0.1, 1.0, 5.0]]))
    sae.W_dec.copy_(sae.W_enc.T)
    numbers = firing(torch.tensor([0.0, 1e-6, 9e-6, 0.2, 0.05], dtype=torch.float64), sae)
    assert (numbers["rare"], numbers["dense"], numbers["dead_heldout"]) == pytest.approx((0.6, 0.2, 0.2))
    assert numbers["rare_cluster"] == 1.0
    assert rare_cluster(torch.eye(2)) == 0.0  # each at 45 degrees to the mean
    assert rare_cluster(torch.ones(3, 1)) == 0.0  # one is no cluster
    assert geometry(sae)["encoder_decoder_cosine"] == pytest.approx(1)
    assert "encoder_decoder_cosine" not in geometry(SAE(2, 5, d_out=3))


# --- transcoders and several SAEs of a site --------------------------------------------------------------------------


def linear_transcoder(weight: torch.Tensor, bias: torch.Tensor, target: str) -> SAE:
    """Predicts `weight x + bias` exactly: x = relu(x) - relu(-x)."""
    d_out, d_in = weight.shape
    sae = SAE(d_in, 2 * d_in, d_out=d_out)
    sae.W_enc.copy_(torch.cat([torch.eye(d_in), -torch.eye(d_in)], dim=1))
    sae.W_dec.copy_(torch.cat([weight.T, -weight.T]))
    sae.b_dec.copy_(bias)
    sae.target = target
    return sae


def test_a_transcoder_predicts_its_target_in_the_same_pass(loaded, rows):
    """The exact map from the MLP's hidden layer to its output loses nothing; a wrong one is measured at the output."""
    dense = loaded.model.get_submodule("gpt_neox.layers.1.mlp.dense_4h_to_h")
    sites, special = resolve_sites(["mlp_hidden.1", "mlp_out.1"], loaded.model), special_ids(loaded.tokenizer)
    exact = linear_transcoder(dense.weight, dense.bias, "mlp_out.1")
    half = linear_transcoder(dense.weight / 2, dense.bias / 2, "mlp_out.1")
    autoencoder = identity_sae(sites[1].width)
    autoencoder.W_dec.mul_(0.5)
    exact.site = half.site = "mlp_hidden.1"
    autoencoder.site = "mlp_out.1"
    saes = {"exact": exact, "half": half, "same as half": autoencoder}
    found = evaluate_saes(loaded.model, sites, saes, rows, special)
    assert found["exact"]["fvu"] < 1e-9
    assert found["exact"]["ce_spliced"] == pytest.approx(found["exact"]["ce_base"], abs=1e-6)
    for key in ("fvu", "ce_spliced", "ce_zero", "ce_mean", "ce_recovered", "kl_spliced", "gamma"):
        assert found["half"][key] == pytest.approx(found["same as half"][key], rel=1e-4), key
    exact.site, exact.target = "mlp_out.1", "mlp_hidden.1"
    backwards = linear_transcoder(
        torch.zeros(sites[0].width, sites[1].width), torch.zeros(sites[0].width), "mlp_hidden.1"
    )
    backwards.site = "mlp_out.1"
    with pytest.raises(ValueError, match="mlp_out.1 does not run before mlp_hidden.1"):
        evaluate_saes(loaded.model, sites, {"b": backwards}, rows, special)


def test_an_sae_that_is_worse_than_the_mean_is_called_so(loaded, rows):
    sites, special = resolve_sites(["mlp_out.1"], loaded.model), special_ids(loaded.tokenizer)
    good, bad = identity_sae(sites[0].width), identity_sae(sites[0].width)
    bad.W_dec.mul_(-1)
    good.site = bad.site = "mlp_out.1"
    found = evaluate_saes(loaded.model, sites, {"good": good, "bad": bad}, rows, special)
    assert found["good"]["beats_mean"] is True
    assert found["bad"]["fvu"] >= 1 and found["bad"]["beats_mean"] is False


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
