"""Which features caused the reward: hand-computed statistics, and a policy whose three causes are known."""

import math

import pytest
import torch
from peft import get_peft_model
from rl_fixtures import GOOD, good_share, tiny_model, tiny_sae, word_tokenizer

import saerl_cli.analysis.attribution as attribution
from saerl_cli.adapter import biases, deltas, sparse_coeffs
from saerl_cli.adapter.coefficients.deltas import site_layers
from saerl_cli.analysis.attribution import advantages, attribute, less_the_others, pass_attributions, scaled, touched
from saerl_cli.analysis.audit.agreement import spearman, top_overlap
from saerl_cli.analysis.audit.classify import sums_by
from saerl_cli.analysis.audit.curves import averaged, control, curve, grid, matched, needed, only, random_order
from saerl_cli.analysis.audit.variants import Gain, Variants, difference, interaction, ratio, row_losses
from saerl_cli.data.prompts import Prompt
from saerl_cli.rewards.score import Part, Reward
from saerl_cli.rl.evaluation.measure import Sampling, generate, heldout_loss, log_probabilities, mean_and_error
from saerl_cli.rl.policy import Policy, plain
from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.files import save_sae

# --- statistics ------------------------------------------------------------------------------------------------------


def test_rank_correlation():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert spearman(x, torch.tensor([5.0, 6.0, 7.0, 8.0, 7.0])) == pytest.approx(8 / math.sqrt(95)), "by hand, one tie"
    assert spearman(x, x.exp()) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)
    assert spearman(x, torch.ones(5)) is None
    many = torch.randn(200, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    other = torch.randn(200, generator=torch.Generator().manual_seed(1)).round(decimals=1) + many
    stats = pytest.importorskip("scipy.stats")
    assert spearman(many, other) == pytest.approx(stats.spearmanr(many, other).statistic)


def test_overlap_of_the_largest():
    x, y = torch.tensor([9.0, -8.0, 1.0, 0.0]), torch.tensor([0.0, 5.0, -7.0, 1.0])
    assert top_overlap(x, y, 2) == 0.5 and top_overlap(x, y, 1) == 0 and top_overlap(x, y, 9) == 1


def test_number_of_features_behind_a_share():
    points = [{"n": n, "share": s, "share_se": 0.05} for n, s in ((1, 0.4), (2, 0.7), (4, 0.93), (8, 0.99), (16, 1.0))]
    # 0.4 + 1.96 * 0.05 = 0.498 and 0.7 + 0.098 fall short of 0.5 and 0.9, 0.93 - 0.098 and 0.99 - 0.098 of 0.9.
    assert needed(points, 0.5) == {"n": 2, "low": 2, "high": 2}
    assert needed(points, 0.49) == {"n": 2, "low": 1, "high": 2}
    assert needed(points, 0.9) == {"n": 4, "low": 4, "high": 16}
    assert needed(points, 0.99) == {"n": 8, "low": 4, "high": None}
    assert needed(points, 1.1) is None


def test_interaction_is_what_the_sum_of_the_two_leaves_over():
    # Reverting i costs 1, j costs 2, both together 5 on the first prompt, 3 on the second.
    assert interaction([10.0, 10.0], [9.0, 9.0], [8.0, 8.0], [5.0, 7.0]) == [-2.0, 0.0]


def test_a_ratio_of_means_and_its_error():
    share, error = ratio([1.0, 3.0], [2.0, 4.0])
    assert share == pytest.approx(2 / 3)
    # residuals 1 - 2 * 2/3 = -1/3 and 3 - 4 * 2/3 = 1/3: standard error 1/3, over the mean 3
    assert error == pytest.approx(1 / 9)
    assert ratio([2.0, 4.0], [2.0, 4.0]) == (1.0, 0.0) and ratio([0.0], [0.0]) == (0.0, 0.0)


def test_the_luck_of_the_references_draw_is_charged_to_nobody():
    """r = m + luck with a lucky draw (mean 0.5): what does not share it gains x - m."""
    luck = [1.5, -0.5, 1.5, -0.5]
    reference = [1.0 + e for e in luck]
    gain = Gain(reference, [2.0, 2.0, 2.0, 2.0], [1.0] * 4)
    assert gain.full == pytest.approx([1.0] * 4), "a policy that nothing sways: b = 0"
    assert gain.over(reference) == pytest.approx([0.0] * 4), "the reference itself: b = 1"
    assert gain.over([1.25 + 0.5 * e for e in luck]) == pytest.approx([0.25] * 4), "half of its luck: b = 1/2"


def test_errors_of_controls_count_draws_too():
    gain = Gain([0.0, 0.0], [1.0, 1.0], [0.0, 0.0])
    point = averaged(gain, [[0.2, 0.2], [0.4, 0.4]])
    assert point["share"] == pytest.approx(0.3) and point["share_se"] == pytest.approx(0.1), "no spread over prompts"
    assert point["spread"] == pytest.approx(math.sqrt(0.02))


def test_numbers_of_features():
    assert grid(1) == [1] and grid(5) == [1, 2, 3, 4, 5] and grid(100)[-3:] == [64, 91, 100]
    assert len(grid(100_000)) < 40


def test_matched_features_are_others_of_like_size():
    size = [float(i) for i in range(1, 101)]
    kept = [10, 50, 90]
    found = matched(size, kept, seed=0)
    assert found is not None and len(set(found)) == 3 and not set(found) & set(kept)
    assert all(abs(size[i] - size[j]) <= 6 for i, j in zip(kept, found, strict=True))
    assert matched(size, kept, seed=0) == found != matched(size, kept, seed=1)
    assert matched(size, list(range(60)), seed=0) is None, "40 are left for 60"
    assert matched([1.0, 0.0, 0.0], [0], seed=0) in ([1], [2]), "a size of 0 has a logarithm too"


def test_sums_of_attributions_by_name():
    attributions = torch.tensor([[1.0, 2.0, 0.0], [3.0, 2.0, 0.0]])
    found = sums_by(["a", "b", "a"], attributions, torch.tensor([1.0, 2.0, 1.0]))
    assert list(found) == ["a", "b"] and found["a"]["features"] == 2
    assert found["a"]["attribution"] == 2 == found["b"]["attribution"]
    assert found["a"]["share"] == 0.5 == found["a"]["effect_share"]
    # shares: residuals 1 - 3/2 and 3 - 5/2 of a: standard error 1/2 over the mean 4
    assert found["a"]["share_se"] == pytest.approx(0.125) == found["b"]["share_se"]
    assert found["b"]["attribution_se"] == 0


def test_a_token_answers_for_what_follows_less_what_others_earn():
    ahead = torch.tensor([[3.0, 1.0], [1.0, 0.0], [2.0, 5.0]], dtype=torch.float64)
    found = less_the_others(ahead, torch.tensor([2, 1, 2]))
    assert found.tolist() == [[1.5, -1.5], [-1.5, 0.0], [0.0, 4.5]]


# --- a policy whose causes are known ---------------------------------------------------------------------------------

CAUSES, DELTA = (5, 17, 40), 0.05
PROMPTS = [Prompt(f"w{i % 30} w{7 * i % 29}", (i % 30 + 2, 7 * i % 29 + 2)) for i in range(600)]
REWARD = Reward((Part("good", 1.0, lambda prompts, texts, ids: good_share(ids)),))


def planted_sae(folder, model, features: int = 64):
    """Random directions, but CAUSES fire always and write towards a third of the rewarded tokens each."""
    unembedding = model.lm_head.weight
    sae = SAE(32, features)
    random = torch.randn(features, 32, generator=torch.Generator().manual_seed(4))
    rows = torch.nn.functional.normalize(random)
    encoder, bias = rows.T.clone(), torch.zeros(features)
    for number, cause in enumerate(CAUSES):
        good = unembedding[list(GOOD)[number::3]].mean(0) - unembedding.mean(0)
        rows[cause], encoder[:, cause], bias[cause] = good / good.norm(), 0.0, 1.0
    sae.W_dec.data.copy_(rows)
    sae.W_enc.data.copy_(encoder)
    sae.b_enc.data.copy_(bias)
    sae.site = "mlp_out.1"
    sae.metadata = {"saerl": {"site": "mlp_out.1"}}
    return save_sae(sae, folder / "planted" / "mlp_out.1")


def build(folder, saes, splice="error_preserving") -> Policy:
    model = get_peft_model(tiny_model(folder / "model"), sparse_coeffs(tiny_model(folder / "model"), saes, splice))
    if splice == "reconstruct":
        model.add_adapter("ref", model.peft_config["default"])
        model.set_adapter("default")
    return plain(Policy(model.eval().requires_grad_(False), word_tokenizer(), [1], 32))


@pytest.fixture(scope="module")
def causes(tmp_path_factory) -> Policy:
    """Delta 0.05 on the three causes, larger ones at random on all others but two."""
    folder = tmp_path_factory.mktemp("causes")
    policy = build(folder, {"mlp_out.1": planted_sae(folder, tiny_model(folder / "model"))})
    (layer,) = site_layers(policy.model).values()
    delta = 5 * DELTA * torch.randn(64, generator=torch.Generator().manual_seed(5))
    delta[list(CAUSES)] = DELTA
    delta[60:62] = 0
    layer.sparse_coeffs_delta["default"].weight.data.copy_(delta)
    return policy


HOW = Sampling(max_new_tokens=8, temperature=1.0, batch_size=300, seed=11)
ROWS = torch.randint(2, 32, (6, 12), generator=torch.Generator().manual_seed(2))
ROWS[:, 0] = 1


@pytest.fixture(scope="module")
def attributed(causes) -> torch.Tensor:
    """Attributions of the first 300 prompts, [prompts, 62]."""
    parts = list(attribute(causes, REWARD, PROMPTS[:300], touched(causes.model), HOW, 4, prefixes=False))
    return torch.stack(parts).mean(0)


@pytest.fixture
def variants(causes) -> Variants:
    """On the other 300 prompts."""
    how = Sampling(8, 1.0, 300, seed=12)
    return Variants(causes, REWARD, PROMPTS[300:], ROWS, how, touched(causes.model))


def gain_of(variants: Variants) -> Gain:
    one = torch.ones(len(variants.coefficients))
    draws = [variants.rewards(0 * one), *(variants.redrawn(0 * one, 100 + i) for i in range(2))]
    return Gain(draws[0], variants.rewards(one), [sum(rewards) / 3 for rewards in zip(*draws, strict=True)])


def test_the_audit_names_the_causes(causes, attributed):
    coefficients = touched(causes.model)
    assert len(coefficients) == 62 and coefficients.sites == ["mlp_out.1"]
    mean, error = attributed.mean(0), attributed.std(0) / math.sqrt(300)
    first = mean.argsort(descending=True)[:3].tolist()
    assert {coefficients.name(i) for i in first} == {f"mlp_out.1:{cause}" for cause in CAUSES}
    assert all(mean[i] > 3 * error[i] for i in first)
    assert mean.sort(descending=True).values[3] < mean[first].min() / 2, "nothing else comes near"
    assert (coefficients.delta.abs() > DELTA).sum() > 30, "which |delta| would not have told"


def test_keeping_the_causes_keeps_the_gain_and_controls_do_not(attributed, variants):
    order = attributed.mean(0).argsort(descending=True, stable=True).tolist()
    gain = gain_of(variants)
    mean, error = mean_and_error(gain.full)
    assert mean > 8 * error, "there is a gain to speak of"
    first, three, full = curve(variants, gain, order, [1, 3, 62])
    assert 0.3 < first["share"] < 0.7 and abs(three["share"] - 1) < 0.1 and (full["share"], full["share_se"]) == (1, 0)
    (without,) = curve(variants, gain, order, [3], keep=False)
    assert without["share"] < 0.1
    orders = [random_order(59, seed) for seed in range(4)]
    others = [i for i in range(62) if i not in order[:3]]
    (random,) = control(variants, gain, lambda n, draw: [others[i] for i in orders[draw][:n]], [3], 4)
    assert random["share"] < 0.1 and random["share_se"] > 0


def test_attributions_sum_to_the_gain(attributed, variants):
    whole, whole_error = mean_and_error(attributed.double().sum(1).tolist())
    mean, error = mean_and_error(gain_of(variants).full)
    # False alarms: 3 standard errors, 0.3 %; four midpoints are exact to far less here.
    assert abs(whole - mean) < 3 * math.hypot(whole_error, error)
    assert abs(whole - mean) < 0.3 * mean, "and the errors are small enough for that to say something"


def test_beginnings_change_the_noise_but_not_the_mean(causes):
    count = Reward((Part("count", 1.0, lambda prompts, texts, ids: [sum(t in GOOD for t in row) for row in ids]),))
    coefficients = touched(causes.model)
    found = {}
    for prefixes in (False, True):
        (part,) = attribute(causes, count, PROMPTS[:300], coefficients, HOW, 1, prefixes)
        found[prefixes] = mean_and_error(part.double().sum(1).tolist())
    (plain_mean, plain_error), (mean, error) = found[False], found[True]
    assert error < 0.9 * plain_error
    assert abs(mean - plain_mean) < 3 * plain_error


def test_weights_of_tokens_by_hand(causes):
    count = Reward((Part("count", 1.0, lambda prompts, texts, ids: [float(sum(row)) for row in ids]),))
    completions = [[3, 4], [5]]
    found = advantages(count, causes, PROMPTS[:2], completions, prefixes=True)
    assert found.tolist() == [[7.0 - 5.0, 4.0 - 0.0], [5.0 - 7.0, 0.0]], "of [3, 4], 4 is still ahead at the second"
    found = advantages(count, causes, PROMPTS[:2], completions, prefixes=False)
    assert found.tolist() == [[2.0, 7.0], [-2.0, 0.0]]


@pytest.mark.parametrize("splice", ["error_preserving", "reconstruct", "pre_activation"])
def test_attributions_are_the_gradient(tmp_path, splice):
    """Against autograd through the adapter's own parameters, with a site below another one."""
    saes = {site: tiny_sae(tmp_path / "sae", site) for site in ("mlp_out.0", "mlp_out.1")}
    policy = build(tmp_path, saes, splice)
    layers = site_layers(policy.model)
    for number, layer in enumerate(layers.values()):
        for parameter in attribution.own_parameters(layer):
            parameter.data.copy_(0.4 * torch.randn(64, generator=torch.Generator().manual_seed(number)))
    prompts, completions = PROMPTS[:3], [[3, 4, 5], [6], [7, 8]]
    weights = torch.randn(3, 3, generator=torch.Generator().manual_seed(9)).double()
    coefficients = touched(policy.model)
    with scaled(policy.model, coefficients, 0.25):
        found = pass_attributions(policy, coefficients, 0.25, prompts, completions, weights, 0.9)
        parameters = {site: attribution.own_parameters(layer) for site, layer in layers.items()}
        for parameter in (p for own in parameters.values() for p in own):
            parameter.requires_grad_(True)
        logp, tokens, mask = log_probabilities(policy.model, prompts, completions, 0, 0.9)
        (logp.gather(-1, tokens[..., None]).squeeze(-1) * mask * weights).sum().backward()
        want = torch.cat([sum(p.detach() / 0.25 * p.grad for p in own) for own in parameters.values()])  # pyright: ignore
    assert len(coefficients) == 128 and found.shape == (3, 128)
    torch.testing.assert_close(found.sum(0).float(), want, rtol=1e-3, atol=1e-5)


# --- variants --------------------------------------------------------------------------------------------------------


def test_coefficients_are_restored_to_the_bit(tmp_path):
    policy = build(tmp_path, {"mlp_out.1": tiny_sae(tmp_path / "sae")}, "pre_activation")
    (layer,) = site_layers(policy.model).values()
    for parameter in attribution.own_parameters(layer):
        parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    before = deltas(policy.model)["mlp_out.1"], biases(policy.model)["mlp_out.1"]
    coefficients = touched(policy.model)
    scale = torch.rand(64, generator=torch.Generator().manual_seed(1))

    def inside() -> None:
        assert torch.equal(deltas(policy.model)["mlp_out.1"], before[0] * scale)
        assert torch.equal(biases(policy.model)["mlp_out.1"], before[1] * scale), "the shift goes with its coefficient"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), scaled(policy.model, coefficients, scale):
        inside()
    after = deltas(policy.model)["mlp_out.1"], biases(policy.model)["mlp_out.1"]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    layer.sparse_coeffs_delta["default"].weight.data[:9] = 0
    assert len(touched(policy.model)) == 64, "a shift alone is a change too"


def test_nothing_kept_is_the_reference_and_all_the_policy(causes, variants):
    total = len(variants.coefficients)
    with causes.reference() as reference:
        want = generate(reference, PROMPTS[300:], causes.tokenizer, [1], 8, 1.0, 300, 12)
        loss = heldout_loss(reference, ROWS)
    nothing = variants.measured(torch.zeros(total))
    assert nothing.completion_ids == want and nothing.rewards == good_share(want)
    assert nothing.kl == [0.0] * 300
    assert sum(nothing.losses or []) / (6 * 11) == pytest.approx(loss, rel=1e-12)
    everything = variants.measured(torch.ones(total))
    assert everything.completion_ids == generate(causes.model, PROMPTS[300:], causes.tokenizer, [1], 8, 1.0, 300, 12)
    assert sum(everything.losses or []) / (6 * 11) == pytest.approx(heldout_loss(causes.model, ROWS), rel=1e-12)
    assert sum(row_losses(causes.model, ROWS, batch_size=2)) == pytest.approx(sum(everything.losses or []), rel=1e-6)


def test_reverting_agrees_with_weighting_the_policys_own_samples(variants, causes):
    """E_variant r = E_policy w r: the same change from samples of the policy alone, where the two are close."""
    coefficients = variants.coefficients
    scale = torch.ones(len(coefficients))
    scale[coefficients.feature.tolist().index(CAUSES[0])] = 0
    policy = variants.measured(torch.ones(len(coefficients)))
    change, error = difference(variants.rewards(scale), policy.rewards)
    ids = policy.completion_ids or []

    def likelihood() -> torch.Tensor:
        logp, tokens, mask = log_probabilities(causes.model, variants.prompts, ids, 0, 1.0)
        return (logp.gather(-1, tokens[..., None]).squeeze(-1) * mask).double().sum(1)

    with torch.no_grad():
        before = likelihood()
        with scaled(causes.model, coefficients, scale):
            weights = (likelihood() - before).exp()
    assert weights.sum() ** 2 / (weights**2).sum() > 100, "effective sample size"
    r = torch.tensor(policy.rewards, dtype=torch.float64)
    weighted, weighted_error = mean_and_error(((weights - 1) * (r - r.mean())).tolist())
    assert weighted < -2 * weighted_error
    assert abs(change - weighted) < 3 * math.hypot(error, weighted_error)


def test_a_variant_is_measured_once_and_read_back_to_the_bit(causes, tmp_path, monkeypatch):
    file = tmp_path / "variants.jsonl"
    how = Sampling(8, 1.0, 300, seed=12)
    arguments = (causes, REWARD, PROMPTS[:20], ROWS, how, touched(causes.model), file)
    scale = only([3, 1, 2], 2, 62)
    assert scale.nonzero()[:, 0].tolist() == [1, 3]
    first = Variants(*arguments)
    rewards, measured = first.rewards(scale), first.measured(scale)
    with file.open("a") as torn:
        torn.write('{"variant": "cut sh')
    again = Variants(*arguments)
    monkeypatch.setattr(Variants, "_rewards", lambda self: pytest.fail("measured again"))
    monkeypatch.setattr(Variants, "_all", lambda self: pytest.fail("measured again"))
    assert again.rewards(scale) == rewards and again.measured(scale) == measured
