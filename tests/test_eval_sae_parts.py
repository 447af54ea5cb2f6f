"""Probes, stability and controls, against slow loops, other libraries and cases that are known."""

import copy
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from eval_sae_runs import MODEL, SETTINGS, tiny_model
from scipy.optimize import minimize

from saerl_cli.activations import capture, special_ids, text_mask, token_rows
from saerl_cli.config.groups import DataConfig
from saerl_cli.config.sae import Architecture
from saerl_cli.models import Site, resolve_sites
from saerl_cli.planted.words import LEXICAL
from saerl_cli.sae import controls, stability
from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.evaluate import control_settings
from saerl_cli.sae.metrics import auroc, evaluate_saes
from saerl_cli.sae.probe import (
    auroc_error,
    class_difference,
    judge,
    labelled_examples,
    lbfgs,
    newton,
    planted_examples,
    planted_labels,
    pooled_features,
    probe,
)


@pytest.fixture(scope="module")
def loaded(tiny_planted_model):
    return tiny_model()


@pytest.fixture(scope="module")
def site(loaded) -> Site:
    return resolve_sites(["mlp_out.1"], loaded.model)[0]


def random_sae(d_in: int = 32, d_sae: int = 40, k: int | None = 3, seed: int = 0) -> SAE:
    g = torch.Generator().manual_seed(seed)
    sae = SAE(d_in, d_sae, "standard" if k is None else "topk", k)
    for parameter in sae.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.5)
    sae.site = "mlp_out.1"
    return sae


# --- labels ----------------------------------------------------------------------------------------------------------


def test_planted_labels_lie_on_their_words(loaded):
    rows, labels, names = planted_labels(DataConfig(), MODEL, loaded, 64, 400)
    text = text_mask(rows, special_ids(loaded.tokenizer))
    words = loaded.tokenizer.convert_ids_to_tokens(rows[text].tolist())
    assert 400 <= len(labels) == len(words) < 500
    for name in ("cursing", "positive", "topic_food"):
        carried = labels[:, names.index(name)].tolist()
        assert carried == [word in LEXICAL[name] for word in words]
        assert any(carried)


def test_no_row_is_on_both_sides_of_the_split(loaded):
    examples = planted_examples(DataConfig(), MODEL, loaded, 64, 1000)
    train, test = (set(examples.cluster[side].tolist()) for side in (examples.training, ~examples.training))
    assert max(train) < min(test) and len(train | test) == len(examples.rows)
    assert len(train) == round(0.8 * len(examples.rows))
    assert examples.example[examples.example >= 0].tolist() == list(range(len(examples.labels)))


def test_documents_are_rows_in_random_order(loaded, tmp_path):
    path = tmp_path / "labels.jsonl"
    texts = ["i loved the film", "i hated it", "the soup was good " * 40] * 10
    path.write_text("".join(json.dumps({"text": t, "label": len(t)}) + "\n" for t in texts))
    examples = labelled_examples(path, loaded, 64, seed=1)
    assert examples.rows.shape == (30, 64)  # the long one is cut
    assert examples.names == ("10", "16", "720")
    for row, owner, label in zip(examples.rows, examples.example, examples.labels, strict=True):
        kept = loaded.tokenizer.decode(row[owner >= 0])
        assert examples.names[int(label.nonzero())] == str(len(next(t for t in texts if t.startswith(kept[:10]))))
        assert owner[0] == -1  # a separator comes first, and is not probed
    assert labelled_examples(path, loaded, 64, seed=1).rows.equal(examples.rows)
    assert not labelled_examples(path, loaded, 64, seed=2).rows.equal(examples.rows)


# --- features of examples --------------------------------------------------------------------------------------------


def test_differences_and_pooled_features_equal_a_slow_loop(loaded, site, tmp_path):
    path = tmp_path / "labels.jsonl"
    texts = ["i loved the film", "i hated it", "the soup was good , really good", "damn !"] * 6
    path.write_text("".join(json.dumps({"text": t, "label": t[:3]}) + "\n" for t in texts))
    examples, sae = labelled_examples(path, loaded, 64, seed=0), random_sae()
    encoders = {"a": ("mlp_out.1", sae.encode)}
    slow = []
    for row, owner in zip(examples.rows, examples.example, strict=True):
        x = capture(loaded.model, [site], row[None])["mlp_out.1"][0]
        slow.append(sae.encode(x[owner >= 0]).mean(0))
    slow = torch.stack(slow).double()
    pooled = pooled_features(loaded, [site], encoders, examples, {"a": torch.tensor([3, 7, 8])})["a"]
    assert torch.allclose(pooled, slow[:, [3, 7, 8]], atol=1e-5)
    difference = class_difference(loaded, [site], encoders, examples, examples.labels)["a"]
    train = examples.training
    for index in range(len(examples.names)):
        positive = examples.labels[:, index]
        expected = slow[train & positive].mean(0) - slow[train & ~positive].mean(0)
        assert torch.allclose(difference[index].double(), expected, atol=1e-5)


# --- logistic regression and its judgement ---------------------------------------------------------------------------


def labelled_points(n=300, columns=3, labels=4):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, columns, generator=g).double()
    truth = x @ torch.randn(columns, labels, generator=g).double() + torch.randn(n, labels, generator=g) > 0.5
    truth[:, 0] = x[:, 0] > 0  # one that can be separated: only the penalty keeps its weights finite
    return x, truth


def test_both_solvers_reach_the_minimum_that_scipy_finds():
    x, truth = labelled_points()
    by_newton = newton(x.expand(4, -1, -1), truth.T)
    by_lbfgs = lbfgs(x, truth)
    for label in range(4):
        y = truth[:, label].double().numpy()

        def loss(w, y=y):
            z = torch.from_numpy(x.numpy() @ w[:3] + w[3])
            return float((torch.nn.functional.softplus(z) - torch.from_numpy(y) * z).sum()) + 0.5 * float(w[:3] @ w[:3])

        expected = torch.from_numpy(minimize(loss, [0.0] * 4, tol=1e-12).x)
        for weight, bias in (by_newton, by_lbfgs):
            assert torch.allclose(torch.cat([weight[label], bias[label, None]]), expected, rtol=1e-3, atol=1e-3)


def test_newton_does_not_overshoot_on_rare_features():
    """A feature that fires on one positive in a thousand is far from zero once standardised."""
    x = torch.zeros(1, 2000, 1).double()
    x[0, :2] = 1
    truth = torch.zeros(1, 2000, dtype=torch.bool)
    truth[0, :2] = True
    x = (x - x.mean()) / x.std()
    weight, bias = newton(x, truth)
    assert weight.isfinite().all() and bias.isfinite().all()
    assert ((x[0] @ weight[0] + bias[0] > 0) == truth[0]).all()


def clustered_scores():
    g = torch.Generator().manual_seed(3)
    cluster = torch.arange(60).repeat_interleave(5)
    truth = (torch.rand(60, generator=g) < 0.4)[cluster] ^ (torch.rand(300, generator=g) < 0.1)
    score = truth + torch.randn(60, generator=g)[cluster] + 0.3 * torch.randn(300, generator=g)
    return (4 * score).round(), truth, cluster  # rounded: with ties


def test_the_error_of_auroc_is_that_of_deleting_clusters():
    score, truth, cluster = clustered_scores()
    error = auroc_error(score, truth, cluster)
    without = torch.tensor([auroc(score[cluster != c], truth[cluster != c]) for c in range(60)])
    deleted = float((59 / 60 * (without - without.mean()).square().sum()).sqrt())
    assert error == pytest.approx(deleted, rel=0.05)
    independent = auroc_error(score, truth, torch.arange(300))
    assert error > 1.5 * independent  # tokens that agree within a cluster are less evidence than they seem


def test_the_error_of_auroc_equals_counting_pairs():
    score, truth, _ = clustered_scores()
    score, truth = score[:80], truth[:80]
    pairs = (score[truth][:, None] > score[~truth]).double() + 0.5 * (score[truth][:, None] == score[~truth]).double()
    p, q = pairs.shape
    area = pairs.mean()
    squares = ((pairs.mean(1) - area) / p).square().sum() + ((pairs.mean(0) - area) / q).square().sum()
    assert auroc_error(score, truth, torch.arange(80)) == pytest.approx(float((squares * 80 / 79).sqrt()))


def test_judging_by_hand():
    logit = torch.tensor([1.0, -1.0, 2.0, -2.0])
    truth = torch.tensor([True, False, False, False])
    scores = judge(logit, truth, torch.tensor([7, 7, 9, 9]))
    assert scores["accuracy"] == 0.75
    assert scores["accuracy_se"] == pytest.approx(0.25)  # of 1 and 1/2: half their difference
    assert scores["auroc"] == pytest.approx(2 / 3)


def test_a_feature_that_is_the_label_is_found_and_others_are_not(loaded, site):
    """Features read the residual direction that a probe of all dimensions finds: one of them tells a curse at once."""
    examples = planted_examples(DataConfig(), MODEL, loaded, 64, 5000)
    names = ["cursing", "positive"]
    columns = [examples.names.index(name) for name in names]
    few = replace(examples, labels=examples.labels[:, columns], names=tuple(names))
    (place,) = resolve_sites(["resid_post.0"], loaded.model)
    x = pooled_features(loaded, [place], {"x": ("resid_post.0", lambda x: x)}, few, {"x": None})["x"]
    weight, bias = lbfgs(x, few.labels)
    sae = SAE(32, 12)
    sae.W_enc.copy_(0.01 * torch.randn(32, 12, generator=torch.Generator().manual_seed(0)))
    sae.W_enc[:, [4, 9]], sae.b_enc[[4, 9]] = weight.T.float(), bias.float() + 50  # above 0, so that none is cut off
    sae.site = "resid_post.0"
    result = probe(loaded, [place], {"sae": sae}, few)
    for name, feature in zip(names, (4, 9), strict=True):
        one, raw = result["saes"]["sae"][name]["1"], result["activations"]["resid_post.0"][name]
        assert one["features"] == [feature]
        assert one["auroc"] > 0.9 and raw["all"]["auroc"] > 0.9 and raw["1"]["auroc"] < one["auroc"] - 0.05
    mean = result["saes"]["sae"]["mean"]
    assert mean["1"]["auroc"] == pytest.approx(sum(result["saes"]["sae"][name]["1"]["auroc"] for name in names) / 2)


def test_labels_that_are_too_rare_are_left_out(loaded, site):
    examples = planted_examples(DataConfig(), MODEL, loaded, 64, 1000)
    labels = torch.zeros(len(examples.labels), 2, dtype=torch.bool)
    labels[::3, 0] = True
    labels[:5, 1] = True
    result = probe(loaded, [site], {"a": random_sae()}, replace(examples, labels=labels, names=("third", "five")))
    assert (list(result["labels"]), result["left_out"]) == (["third"], ["five"])
    assert result["labels"]["third"]["majority"] == pytest.approx(2 / 3, abs=0.01)
    alone = probe(loaded, [site], {}, replace(examples, labels=labels[:, 1:], names=("five",)))
    assert alone["left_out"] == ["five"] and alone["saes"] == {}


# --- stability -------------------------------------------------------------------------------------------------------


def test_the_pairing_is_the_best_of_all_permutations():
    g = torch.Generator().manual_seed(6)
    a, b = torch.randn(6, 4, generator=g), torch.randn(6, 4, generator=g)
    cosines = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
    best = max(itertools.permutations(range(6)), key=lambda p: float(cosines[range(6), p].sum()))
    chosen = cosines[range(6), best]
    found = stability.compared(a, 3 * b)  # lengths do not matter
    assert found["matched"] == pytest.approx(float(chosen.mean()), abs=1e-6)
    assert found["shared"] == pytest.approx(float((chosen > 0.7).float().mean()))
    assert found["mmcs"] == pytest.approx(float((cosines.max(0).values.mean() + cosines.max(1).values.mean()) / 2))
    assert stability.compared(a, b[torch.randperm(6, generator=g)]) == pytest.approx(found)


def test_saes_of_one_site_and_width_are_compared_with_chance(monkeypatch):
    saes = {str(seed): random_sae(d_sae=64, seed=seed) for seed in range(2)}
    for seed, sae in enumerate(saes.values()):
        sae.metadata = {"saerl": {"training": {"seed": seed}}}
    saes["copy"] = copy.deepcopy(saes["0"])
    saes["copy"].W_dec.copy_(saes["0"].W_dec[torch.randperm(64, generator=torch.Generator().manual_seed(1))])
    saes["narrow"], saes["elsewhere"] = random_sae(d_sae=32), random_sae(d_sae=64)
    saes["elsewhere"].site = "mlp_out.2"
    found = {tuple(pair["saes"]): pair for pair in stability.stability(saes)}
    assert set(found) == {("0", "1"), ("0", "copy"), ("1", "copy")}
    assert found["0", "copy"]["matched"] == pytest.approx(1, abs=1e-6) and found["0", "copy"]["seeds"] == [0, 0]
    assert found["0", "1"]["seeds"] == [0, 1]
    for key in ("mmcs", "matched"):  # random decoders are as alike as random directions
        assert found["0", "1"][key] == pytest.approx(found["0", "1"][f"{key}_random"], abs=0.02)
    monkeypatch.setattr(stability, "MATCHED_UP_TO", 50)
    assert "matched" not in stability.stability(saes)[0]


# --- controls --------------------------------------------------------------------------------------------------------


def test_shuffling_permutes_every_parameter_and_leaves_the_model_alone(loaded):
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    shuffled, again, other = (controls.shuffled_model(loaded.model, seed) for seed in (0, 0, 1))
    for name, parameter in loaded.model.named_parameters():
        assert parameter.equal(before[name])
        mixed = shuffled.get_parameter(name)
        assert mixed.flatten().sort().values.equal(parameter.flatten().sort().values)
        assert mixed.equal(again.get_parameter(name))
        if len(parameter.unique()) > 10:
            assert not mixed.equal(parameter) and not mixed.equal(other.get_parameter(name))
    assert "gpt_neox.embed_in.weight" in before


@pytest.mark.parametrize("k", [None, 3])
def test_random_directions_fire_as_often_and_are_scaled_as_well_as_can_be(k):
    g = torch.Generator().manual_seed(0)
    x, sae = 2 + torch.randn(500, 32, generator=g), random_sae(k=k)
    sae.b_enc.sub_(4)
    random = controls.random_like(sae, x, g)
    assert torch.allclose(random.W_dec.norm(dim=-1), torch.ones(40), atol=1e-5)
    scale = random.W_enc / random.W_dec.T
    assert torch.allclose(scale, scale[0, 0].expand_as(scale), rtol=1e-4)  # the transpose times one number
    fires, expected = ((s.encode(x) != 0).sum() for s in (random, sae))
    assert abs(int(fires) - int(expected)) <= (1 if k is None else 500)  # topk: k at most, of which some may be 0
    error = (random(x) - x).square().sum()
    for factor in (0.95, 1.05):
        worse = copy.deepcopy(random)
        worse.W_dec.mul_(factor)
        assert (worse(x) - x).square().sum() > error
    assert error < (x - x.mean(0)).square().sum()


def planted_shape(layers: int) -> SimpleNamespace:
    config = SimpleNamespace(model_type="gpt_neox", num_hidden_layers=layers, hidden_size=8, intermediate_size=32)
    return SimpleNamespace(config=config)


@pytest.mark.parametrize(
    "layers, source, target, expected",
    [
        (4, "mlp_out.1", "mlp_out.1", ("mlp_out.3", "mlp_out.3")),
        (4, "mlp_out.3", "mlp_out.3", ("mlp_out.1", "mlp_out.1")),  # layer 0 is trivial
        (4, "resid_post.3", "resid_post.3", ("resid_post.0", "resid_post.0")),
        (5, "mlp_in.2", "mlp_out.2", ("mlp_in.4", "mlp_out.4")),
        (2, "mlp_out.1", "mlp_out.1", None),
    ],
)
def test_the_wrong_layer_is_the_farthest(layers, source, target, expected):
    model = planted_shape(layers)
    place = tuple(resolve_sites([name], model)[0] for name in (source, target))
    found = controls.farthest(place, model)
    assert (found and tuple(site.name for site in found)) == expected


def test_an_sae_elsewhere_is_the_same_sae(loaded):
    (place,) = resolve_sites(["resid_post.0"], loaded.model)
    sae = random_sae()
    sae.site = "resid_post.0"
    moved, sites = controls.elsewhere({"a": sae}, {"a": (place, place)}, loaded.model)
    assert (moved["a"].site, sae.site, [site.name for site in sites]) == (
        "resid_post.1",
        "resid_post.0",
        ["resid_post.1"],
    )
    assert moved["a"].W_dec is sae.W_dec
    rows = token_rows(["we saw the film and loved it ."] * 9, loaded.tokenizer, 24)
    found = evaluate_saes(
        loaded.model, [place, *sites], {"a": sae, "b": moved["a"]}, rows, special_ids(loaded.tokenizer)
    )
    assert found["a"]["fvu"] != found["b"]["fvu"]


def test_settings_of_a_control_are_the_recorded_ones():
    record = {"architecture": "relu", "l1": 2.0, "batch_size": 512, "tokens": 10**8, "init_from": "somewhere"}
    found = control_settings({"metadata": {"saerl": {"site": "mlp_out.1", "training": record}}}, 1000)
    assert found is not None
    assert (found.architecture, found.l1, found.tokens, found.init_from) == (Architecture.relu, 2.0, 1000, None)
    assert control_settings({"metadata": {}}, 1000) is None
    with pytest.raises(ValueError, match="control_tokens=100 is less than one batch of 512"):
        control_settings({"metadata": {"saerl": {"training": record}}}, 100)


def test_saes_are_trained_alike_on_another_model(loaded, site):
    """The control learns its own model's activations, each SAE with its own settings and at its own site."""
    hidden, other = resolve_sites(["mlp_hidden.1", "resid_post.0"], loaded.model)
    settings = {"a": SETTINGS, "b": replace(SETTINGS, batch_size=512, k=6), "transcoder": SETTINGS}
    places = {"a": (site, site), "b": (other, other), "transcoder": (hidden, site)}
    saes = {"a": random_sae(), "b": random_sae(), "transcoder": SAE(128, 512, "topk", 4, d_out=32)}
    saes["b"].site, saes["transcoder"].site, saes["transcoder"].target = "resid_post.0", "mlp_hidden.1", "mlp_out.1"
    special, shuffled = special_ids(loaded.tokenizer), controls.shuffled_model(loaded.model, 0)
    rows, _, _ = planted_labels(DataConfig(), MODEL, loaded, 64, 2000)
    made = controls.trained_alike(shuffled, saes, settings, places, rows, special, seed=0)
    sites = {"mlp_out.1": site, "resid_post.0": other, "mlp_hidden.1": hidden}
    assert {name: (sae.site, sae.target, sae.k) for name, sae in made.items()} == {
        "a": ("mlp_out.1", None, 4),
        "b": ("resid_post.0", None, 6),
        "transcoder": ("mlp_hidden.1", "mlp_out.1", 4),
    }
    there, here = (evaluate_saes(m, list(sites.values()), made, rows, special) for m in (shuffled, loaded.model))
    for name in made:
        assert there[name]["fvu"] < 0.6 < here[name]["fvu"]
