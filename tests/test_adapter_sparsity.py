"""What keeps coefficients few and small: the proximal step, top-k, bounds, gates, subsets of features."""

import math

import pytest
import torch
from adapter_fixtures import FEATURES, coefficients_on, tiny_neox, tokens
from rl_fixtures import build_trainer, trained

from saerl_cli.adapter import deltas, site_layers
from saerl_cli.adapter.coefficients.gates import INITIAL, expected_open, gate, logistic_noise
from saerl_cli.adapter.coefficients.sparsity import Sparsity, allowed
from saerl_cli.config.adapter import SparsityConfig

SITES = ("mlp_out.1", "mlp_out.2")


def policy_with(tmp_path, *values, **fields):
    """Two sites; the first coefficients of the first are given, the last of the second is 0.5."""
    policy = coefficients_on(tiny_neox(), tmp_path, SITES, **fields)
    first, second = (layer.sparse_coeffs_delta["default"].weight for layer in site_layers(policy).values())
    first.data[: len(values)] = torch.tensor(values)
    second.data[-1] = 0.5
    return policy


def test_l1_is_a_soft_threshold_of_lr_times_weight(tmp_path):
    policy = policy_with(tmp_path, 0.3, -0.3, 0.05, -0.2)
    Sparsity(policy, SparsityConfig(l1=2.0)).after_step(lr=0.1, progress=0.5)  # threshold 0.2
    first, second = deltas(policy).values()
    torch.testing.assert_close(first[:4], torch.tensor([0.1, -0.1, 0.0, 0.0]))
    assert first[2] == 0 and first[3].abs() < 1e-7 and float(second[-1]) == pytest.approx(0.3)
    assert int((first != 0).sum()) <= 3


def test_l1_may_be_scaled_by_a_feature_s_effect(tmp_path):
    policy = policy_with(tmp_path, 0.3, 0.3)
    scale = torch.ones(FEATURES)
    scale[0] = 0.5
    Sparsity(policy, SparsityConfig(l1=1.0), effect={"mlp_out.1": scale}).after_step(lr=0.2, progress=1.0)
    first, second = deltas(policy).values()
    torch.testing.assert_close(first[:2], torch.tensor([0.2, 0.1]))
    assert float(second[-1]) == pytest.approx(0.3), "1 where there is no scale"


def test_top_k_keeps_the_largest_over_all_sites(tmp_path):
    policy = policy_with(tmp_path, 0.3, -0.9, 0.05, 0.6)
    limits = Sparsity(policy, SparsityConfig(top_k=3, top_k_anneal=0.5))
    limits.after_step(lr=0.1, progress=0.01)
    assert sum(int((delta != 0).sum()) for delta in deltas(policy).values()) == 5, "all are allowed at the start"
    limits.after_step(lr=0.1, progress=0.5)
    first, second = deltas(policy).values()
    assert first[:4].tolist() == pytest.approx([0, -0.9, 0, 0.6]) and float(second[-1]) == 0.5
    assert first[0] == 0 == first[2]


def test_the_number_allowed_falls_along_a_cubic():
    assert [allowed(10, 1010, 0.5, progress) for progress in (0.0, 0.25, 0.5, 1.0)] == [1010, 135, 10, 10]
    assert allowed(10, 1010, 0.0, 0.01) == 10


def test_bounds(tmp_path):
    policy = policy_with(tmp_path, 0.3, -0.3, 2.0, -2.0)
    Sparsity(policy, SparsityConfig(min_coeff=0.0)).after_step(0.1, 0.5)
    assert deltas(policy)["mlp_out.1"][:4].tolist() == pytest.approx([0.3, -0.3, 2.0, -1.0])
    Sparsity(policy, SparsityConfig(min_coeff=0.0, max_delta=0.25)).after_step(0.1, 0.5)
    assert deltas(policy)["mlp_out.1"][:4].tolist() == [0.25, -0.25, 0.25, -0.25]


def test_more_to_keep_than_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"top_k=81 is more than the 80 coefficients that may be trained"):
        Sparsity(policy_with(tmp_path), SparsityConfig(top_k=81))
    free = {site: torch.arange(FEATURES) < 3 for site in SITES}
    with pytest.raises(ValueError, match=r"top_k=7 is more than the 6 coefficients"):
        Sparsity(policy_with(tmp_path), SparsityConfig(top_k=7), free)


# --- gates -----------------------------------------------------------------------------------------------------------


def test_gates_are_the_published_distribution():
    log_alpha = torch.full((200_000,), 0.3)
    z = gate(log_alpha, logistic_noise(len(log_alpha), torch.Generator().manual_seed(0)))
    assert z.min() == 0 and z.max() == 1
    open_share = 1 / (1 + math.exp(-(0.3 - 2 / 3 * math.log(0.1 / 1.1))))
    assert float((z != 0).float().mean()) == pytest.approx(open_share, abs=3e-3)
    assert float(expected_open(log_alpha)[0]) == pytest.approx(open_share, abs=1e-6)
    assert float(gate(torch.tensor(0.3))) == pytest.approx(1.2 / (1 + math.exp(-0.3)) - 0.1)
    assert gate(torch.tensor([-9.0, 9.0])).tolist() == [0, 1]


def test_gates_act_on_coefficients_and_leave_an_untouched_model_alone(tmp_path):
    base = tiny_neox()(tokens()).logits
    policy = coefficients_on(tiny_neox(), tmp_path, SITES, gates=True)
    limits = Sparsity(policy, SparsityConfig(hard_concrete=0.1))
    limits.begin_phase(seed=4)
    assert torch.equal(policy.train()(tokens()).logits, base) and torch.equal(policy.eval()(tokens()).logits, base)
    for layer in site_layers(policy).values():
        layer.sparse_coeffs_delta["default"].weight.data.fill_(0.7)
        assert layer.sparse_coeffs_gate["default"].weight[0].item() == pytest.approx(INITIAL)
    calm = policy(tokens()).logits
    noisy = policy.train()(tokens()).logits
    assert not torch.equal(calm, noisy) and torch.equal(policy(tokens()).logits, noisy), "held through a phase"
    limits.begin_phase(seed=5)
    assert not torch.equal(policy(tokens()).logits, noisy)
    limits.begin_phase(seed=4)
    assert torch.equal(policy(tokens()).logits, noisy), "a function of the seed"
    layer = site_layers(policy)["mlp_out.1"]
    layer.sparse_coeffs_gate["default"].weight.data[7] = -9.0
    assert deltas(policy)["mlp_out.1"][7] == 0, "as in evaluation: closed is exactly untouched"
    with policy.disable_adapter():
        assert torch.equal(policy(tokens()).logits, base)


def test_the_penalty_counts_gates_expected_to_be_open(tmp_path):
    policy = coefficients_on(tiny_neox(), tmp_path, SITES, gates=True)
    one = float(expected_open(torch.tensor(INITIAL)))
    penalty = Sparsity(policy, SparsityConfig(hard_concrete=0.1)).penalty()
    assert penalty.item() == pytest.approx(0.1 * 2 * FEATURES * one, rel=1e-5)
    free = {site: torch.arange(FEATURES) < 3 for site in SITES}
    assert Sparsity(policy, SparsityConfig(hard_concrete=0.1), free).penalty().item() == pytest.approx(0.6 * one)
    assert Sparsity(policy, SparsityConfig(hard_concrete=0.0)).penalty() is None


def test_sampling_is_scored_with_the_gates_it_was_sampled_with(tmp_path):
    """TRL generates in training mode; were it otherwise, the first step's ratio would not be 1."""
    rows = []
    trainer = build_trainer(
        tmp_path, sparsity=SparsityConfig(hard_concrete=1e-4), on_phase=rows.append, max_steps=3,
        steps_per_generation=1, num_iterations=1, per_device_train_batch_size=16, learning_rate=0.5,
    )  # fmt: skip
    seen = []
    true = trainer.sample

    def watched(*args, **kwargs):
        layer = site_layers(trainer.model)["mlp_out.1"]
        seen.append((layer.training, layer.gate_noise.clone()))
        return true(*args, **kwargs)

    trainer.sample = watched
    trainer.train()
    assert all(training for training, _ in seen) and len(seen) == 3
    assert not torch.equal(seen[0][1], seen[1][1])
    assert max(row["ratio_deviation"] for row in rows) < 1e-5 and rows[0]["kl"] == 0 < rows[-1]["kl_k3"]


def test_the_penalty_is_added_once_a_step_however_it_is_split(tmp_path):
    """With a reward that says nothing to the coefficients, gates move by the penalty's gradient alone."""
    found = []
    for size, steps, accumulate in ((4, 4, 1), (1, 16, 4)):
        trainer = build_trainer(
            tmp_path, sparsity=SparsityConfig(hard_concrete=0.5), phases=1, per_device_train_batch_size=size,
            steps_per_generation=steps, gradient_accumulation_steps=accumulate, max_grad_norm=1e9, adam_epsilon=1.0,
        )  # fmt: skip
        trainer.train()
        found.append(trained(trainer))
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], atol=2e-6, rtol=1e-4, msg=name)
    moved = next(tensor for name, tensor in found[0].items() if "gate" in name)
    assert (moved < INITIAL).all()


# --- in a run --------------------------------------------------------------------------------------------------------


def test_frozen_features_get_no_gradient_and_stay_exactly_untouched(tmp_path):
    free = torch.zeros(64, dtype=torch.bool)
    free[[3, 10, 20]] = True
    rows = []
    trainer = build_trainer(tmp_path, free={"mlp_out.1": free}, phases=2, weight_decay=0.1, on_phase=rows.append)
    trainer.train()
    delta = deltas(trainer.model)["mlp_out.1"]
    assert not delta[~free].any() and delta[free].all()
    moments = [state["exp_avg"] for state in trainer.optimizer.state.values() if state["exp_avg"].shape == (64,)]
    assert not moments[0][~free].any()


def test_a_run_ends_with_the_sparsity_that_was_asked_for(tmp_path):
    plain = build_trainer(tmp_path, phases=2)
    plain.train()
    few = build_trainer(tmp_path, phases=2, sparsity=SparsityConfig(top_k=5, top_k_anneal=0.5))
    few.train()
    bounded = build_trainer(tmp_path, phases=2, sparsity=SparsityConfig(l1=0.3, max_delta=0.1))
    bounded.train()
    counts = [int((deltas(t.model)["mlp_out.1"] != 0).sum()) for t in (plain, few, bounded)]
    assert counts[0] > 40 and counts[1] <= 5 and counts[2] < counts[0]
    assert deltas(bounded.model)["mlp_out.1"].abs().max() <= 0.1 < deltas(plain.model)["mlp_out.1"].abs().max()
