"""Every algorithm: what moves, exact resume, seeds, equal updates however a batch is split, and PPO's options."""

import math

import pytest
import torch
from datasets import Dataset
from rl_fixtures import build_trainer, good_share, prompts, tiny_model, trained
from safetensors.torch import load_file

from saerl_cli.rl.proof import all_tensors, frozen_hashes
from saerl_cli.rl.rollouts.scoring import is_value_parameter
from saerl_cli.rl.training.base import Diverged, EpochOrder
from saerl_cli.rl.training.kl_control import HIGHEST, LOWEST, next_coefficient
from saerl_cli.rl.training.normalise import Normaliser
from saerl_cli.rl.training.regression import effective_number, optimal_weights

ALGOS = ("grpo", "rloo", "sft", "dpo", "rwr")
GROUPS = ("grpo", "rloo")


def run(folder, **settings):
    rows = []
    trainer = build_trainer(folder, on_phase=rows.append, **settings)
    trainer.train()
    return trainer, rows


def untimed(rows):
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


@pytest.mark.parametrize("adapter", ["sparse_coeffs", "full"])
@pytest.mark.parametrize("algo", ALGOS)
def test_only_what_is_named_moves(tmp_path, algo, adapter):
    rows = []
    trainer = build_trainer(tmp_path, adapter, algo=algo, on_phase=rows.append, phases=2)
    before = {name: tensor.detach().clone() for name, tensor in all_tensors(trainer)}
    hashes, moving = frozen_hashes(trainer), {name for name, _ in trainer.trainable()}
    trainer.train()
    changed = {name for name, tensor in all_tensors(trainer) if not torch.equal(tensor, before[name])}
    assert changed and changed <= moving and hashes == frozen_hashes(trainer)
    if adapter == "sparse_coeffs":
        assert moving == {name for name in before if "sparse_coeffs_delta" in name}
    else:
        assert any(name.startswith("reference.") for name in before), "a frozen copy is what the policy strays from"
    assert [row["phase"] for row in rows] == [1, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())


@pytest.mark.parametrize("algo", GROUPS)
def test_the_kl_is_nought_before_anything_is_learned(tmp_path, algo):
    _, rows = run(tmp_path, algo=algo, phases=2)
    assert rows[0]["kl"] == rows[0]["kl_k3"] == rows[0]["kl_exact"] == 0
    assert rows[1]["kl_exact"] > 0 and rows[1]["kl_k3"] > 0


@pytest.mark.parametrize("splice", ["reconstruct", "pre_activation"])
@pytest.mark.parametrize("algo", ALGOS)
def test_every_splice(tmp_path, algo, splice):
    trainer, rows = run(tmp_path, algo=algo, splice=splice, phases=1)
    assert ("ref" in trainer.model.peft_config) == (splice == "reconstruct")
    if algo in GROUPS:
        assert rows[0]["kl_exact"] == 0
    if algo == "dpo":
        assert build_and_first_loss(tmp_path, splice) == pytest.approx(math.log(2)), (
            "at the reference nothing is preferred"
        )


def build_and_first_loss(folder, splice):
    _, rows = run(folder, algo="dpo", splice=splice, max_steps=1, phase_steps=1)
    return rows[0]["loss"]


@pytest.mark.parametrize("algo", ALGOS)
def test_resume_is_exact_inside_and_across_epochs(tmp_path, algo):
    saving = {"save_strategy": "steps", "save_steps": 8}
    if algo in GROUPS:
        saving |= {"kl_target": 1.0, "train_dataset": prompts(10)}  # two phases of 4 prompts an epoch, the rest dropped
    whole, rows = run(tmp_path, algo=algo, phases=5, **saving)  # 40 sequences are 5 steps of 8
    want = trained(whole)
    for step in (8, 16, 24):
        tail = []
        again = build_trainer(tmp_path, algo=algo, phases=5, on_phase=tail.append, **saving)
        again.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        assert all(torch.equal(tensor, trained(again)[name]) for name, tensor in want.items())
        assert untimed(tail) == untimed(rows[step // 8 :])
    if algo in GROUPS:
        assert len({row["kl_coef"] for row in rows}) > 1, "the adaptive coefficient must be part of what is compared"


@pytest.mark.parametrize("algo", ["ppo", *ALGOS])
def test_a_seed_gives_the_same_run_and_another_seed_another(tmp_path, algo):
    first, second, other = (trained(run(tmp_path, algo=algo, phases=1, seed=seed)[0]) for seed in (1, 1, 2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


@pytest.mark.parametrize("algo", ALGOS)
def test_micro_batches_add_up_to_the_minibatch(tmp_path, algo):
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "steps_per_generation": 16}
    if algo not in GROUPS:
        split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    whole, rows = run(tmp_path, algo=algo, phases=1, max_grad_norm=1e9)
    parts, rows_split = run(tmp_path, algo=algo, phases=1, max_grad_norm=1e9, **split)
    for name, tensor in trained(whole).items():
        torch.testing.assert_close(trained(parts)[name], tensor, atol=2e-6, rtol=1e-4, msg=name)
    for key in ("grad_norm", "approx_kl", "entropy", "loss"):
        if key in rows[0] and not (algo not in GROUPS and key == "entropy"):  # TRL's mean of means
            assert rows_split[0][key] == pytest.approx(rows[0][key], rel=1e-3, abs=1e-6), key


@pytest.mark.parametrize("algo", ["ppo", *ALGOS])
def test_dropout_is_off(tmp_path, algo):
    model = tiny_model(tmp_path / "model")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    trainer = build_trainer(tmp_path, algo=algo, model=model)
    dropouts = [m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts and not any(dropouts)


@pytest.mark.parametrize("algo", ["sft", "dpo", "rwr"])
def test_learns_what_it_is_shown(tmp_path, algo):
    _, rows = run(tmp_path, algo=algo, phases=8, adapter="full")
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    if algo == "dpo":
        assert rows[-1]["rewards/accuracies"] > 0.95 > rows[0]["rewards/accuracies"]


@pytest.mark.slow
@pytest.mark.parametrize("algo", GROUPS)
def test_learns_the_planted_reward(tmp_path, algo):
    _, rows = run(tmp_path, algo=algo, phases=25, per_device_train_batch_size=8, learning_rate=0.3, beta=0.01)
    assert rows[-1]["reward"] > rows[0]["reward"] + 0.15


@pytest.mark.parametrize("algo", ["sft", "dpo", "rwr"])
def test_too_few_rows_are_refused(tmp_path, algo):
    with pytest.raises(ValueError, match="there are 40 sequences or pairs, but one optimiser step takes 64"):
        build_trainer(tmp_path, algo=algo, per_device_train_batch_size=64)


@pytest.mark.parametrize("algo", ALGOS)
def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, algo):
    trainer = build_trainer(tmp_path, algo=algo)
    next(p for _, p in trainer.trainable()).register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(Diverged, match="phase 1 .*a gradient is not finite"):
        trainer.train()


def test_weighted_likelihood_finds_the_kl_optimal_policy(tmp_path):
    model, beta, prompt = tiny_model(tmp_path / "model"), 0.5, [5, 9]
    reference = model(input_ids=torch.tensor([prompt])).logits[0, -1].detach().double().softmax(-1)  # [vocabulary]
    rewards = torch.linspace(0, 1, len(reference), dtype=torch.float64).roll(7)
    best = reference * (rewards / beta).exp()
    best /= best.sum()
    weights = (best * len(best)).tolist()  # of every one-token completion, each drawn once
    rows = [{"prompt_ids": prompt, "completion_ids": [v], "weight": w} for v, w in enumerate(weights)]
    settings = {"per_device_train_batch_size": len(rows), "learning_rate": 3e-3, "longest": 1}
    trainer, _ = run(
        tmp_path, adapter="full", algo="rwr", model=model, train_dataset=Dataset.from_list(rows), phases=30, **settings
    )
    found = trainer.model(input_ids=torch.tensor([prompt])).logits[0, -1].detach().double().softmax(-1)
    kl = (best * (best / found).log()).sum().item()
    before = (best * (best / reference).log()).sum().item()
    assert kl < 0.002 < 0.05 < before


def test_weights_of_the_optimal_policy_by_hand():
    weights = optimal_weights(torch.tensor([[0.0, 1.0], [3.0, 3.0]]), beta=0.5)
    share = math.exp(2) / (1 + math.exp(2))
    assert weights.tolist() == [pytest.approx([2 * (1 - share), 2 * share]), pytest.approx([1, 1])]
    assert effective_number(weights) == pytest.approx((1 / (share**2 + (1 - share) ** 2) + 2) / 2)


def test_the_order_of_rows_is_a_function_of_seed_and_epoch():
    epoch = [0]
    order = EpochOrder(10, 4, 5, lambda: epoch[0])
    first = list(order)
    assert first == list(order) and len(first) == len(order) == 8 and len(set(first)) == 8
    epoch[0] = 1
    assert list(order) != first


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ["ppo", *GROUPS])
def test_a_clipped_score_and_a_missing_end_reach_the_advantages(tmp_path, algo):
    """Two parts whose sum is clipped, then less the penalty: advantages as of a reward that is so already."""

    def shaped(completion_ids, **_):
        total = [2 * a for a in good_share(completion_ids)]
        return [min(max(x, -0.5), 0.5) - 1.5 * (1 not in ids) for x, ids in zip(total, completion_ids, strict=True)]

    rows = [{"prompt": f"w{i // 4} w{i // 4 + 1} w3"} for i in range(16)]
    settings = {"algo": algo, "missing_eos_penalty": 1.5}
    split = build_trainer(tmp_path, reward=[good_share, good_share], **settings)
    split.normaliser = Normaliser(clip=0.5)
    plain = build_trainer(tmp_path, algo=algo, reward=shaped)
    batches = []
    for trainer in (split, plain):
        trainer.begin_phase()
        batches.append(trainer.rollout(rows))
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.rollout.completion_ids, other.rollout.completion_ids)
        torch.testing.assert_close(one.rollout.advantages, other.rollout.advantages, atol=1e-5, rtol=1e-5)
    written = [
        batch.rollout.completion_ids[row, batch.rollout.mask[row].bool()].tolist()
        for batch in batches[0]
        for row in range(len(batch.rollout.mask))
    ]
    totals = [2 * share for share in good_share(written)]
    assert len(set(shaped(written))) > 2, "both rules must have mattered"
    share = sum(total > 0.5 for total in totals) / len(totals)
    assert 0 < share < 1 and split.rollout_statistics["reward_clipped"] == pytest.approx(share)


def test_exact_kl_is_what_the_full_distributions_give(tmp_path):
    trainer = build_trainer(tmp_path, temperature=0.7)
    generator = torch.Generator().manual_seed(2)
    for _, p in trainer.trainable():
        p.data.add_(0.5 * torch.randn(p.shape, generator=generator))
    trainer.begin_phase()
    micro_batches = trainer.rollout([{"prompt": "w1 w2 w3"}, {"prompt": "w4 w5 w6"}])
    got, (batch,) = trainer.exact_kl(micro_batches), micro_batches
    for row in range(2):
        length = int(batch.rollout.mask[row].sum())
        ids = torch.cat([batch.rollout.prompt_ids[row], batch.rollout.completion_ids[row, :length]])[None]
        logp = (trainer.model(ids).logits[0, 2 : 2 + length] / 0.7).log_softmax(-1)
        with trainer.model.disable_adapter():
            base = (trainer.model(ids).logits[0, 2 : 2 + length] / 0.7).log_softmax(-1)
        assert got[row].item() == pytest.approx((logp.exp() * (logp - base)).sum().item(), rel=1e-3)


# --- the KL target ---------------------------------------------------------------------------------------------------


def test_the_coefficient_answers_the_error_and_its_change():
    assert next_coefficient(0.1, 2.0, 2.0, 2.0) == pytest.approx(0.1)
    steady = next_coefficient(0.1, 4.0, 4.0, 2.0, gain=1.0)
    assert steady == pytest.approx(0.1 * math.exp(0.5 / 4))
    rising = next_coefficient(0.1, 4.0, 2.0, 2.0, gain=1.0)
    assert rising == pytest.approx(0.1 * math.exp(math.log(2) + 0.5 / 4))
    near, far = next_coefficient(0.1, 1.6, 1.6, 2.0, gain=1.0), next_coefficient(0.1, 0.5, 0.5, 2.0, gain=1.0)
    assert near == pytest.approx(0.1 * math.exp(math.log(0.8) / 4)) and far == 0.1, "on its way up"


def test_the_coefficient_stays_within_its_bounds():
    low = high = 0.1
    for _ in range(2000):
        low, high = next_coefficient(low, 0.7, 0.7, 1.0), next_coefficient(high, 1e9, 1e9, 1.0)
    assert low == LOWEST > 0 and high == HIGHEST
    assert 0 < next_coefficient(LOWEST, -5.0, 1.0, 1.0) <= HIGHEST, "an estimate may be negative"


def test_the_coefficient_reaches_the_loss_of_grpo_and_the_reward_of_rloo(tmp_path):
    for algo in GROUPS:
        trainer, rows = run(tmp_path, algo=algo, phases=3, kl_target=0.5)
        assert rows[0]["kl_coef"] > rows[1]["kl_coef"] >= trainer.kl_coef > 0


# --- PPO's options ---------------------------------------------------------------------------------------------------


def test_a_shared_critic_moves_the_policy_and_a_detached_one_does_not(tmp_path):
    for critic, moves in (("detached", False), ("shared", True)):
        settings = {"critic": critic, "phases": 1, "vf_coef": 10.0, "cliprange_value": 10.0}
        trainer = build_trainer(tmp_path, reward=lambda completion_ids, **_: [1.0] * len(completion_ids), **settings)
        trainer.value_head.out.weight.data.normal_(generator=torch.Generator().manual_seed(0))
        ids = torch.arange(2, 12)[None]
        trainer.model(input_ids=ids, labels=ids, fused_lm_head=True).state_values.sum().backward()
        reached = [n for n, p in trainer.trainable() if p.grad is not None and not is_value_parameter(n)]
        assert bool(reached) == moves


@pytest.mark.parametrize("adapter", ["sparse_coeffs", "full"])
def test_a_separate_critic_learns_and_leaves_the_policy_alone(tmp_path, adapter):
    trainer, rows = run(tmp_path, adapter=adapter, critic="separate", phases=2, value_learning_rate=1e-3)
    values = {name: p for name, p in trainer.trainable() if is_value_parameter(name)}
    base = tiny_model(tmp_path / "model")
    trunk = sum(p.numel() for p in base.gpt_neox.parameters())
    assert sum(p.numel() for p in values.values()) == trunk + 33
    start = dict(base.gpt_neox.named_parameters())
    moved = [n for n, p in values.items() if "trunk" in n and not torch.equal(p, start[n.split("trunk.")[1]])]
    assert len(moved) > len(start) // 2, "all of it is trained"
    assert rows[-1]["explained_variance"] != 0
    if adapter == "sparse_coeffs":
        policy = {name for name, p in trainer.trainable() if not is_value_parameter(name)}
        assert all("sparse_coeffs_delta" in name for name in policy)


def test_a_separate_critic_begins_at_nought_and_resumes_exactly(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 8, "critic": "separate"}
    trainer, rows = run(tmp_path, **saving)
    again = build_trainer(tmp_path, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))
    assert all(torch.equal(tensor, trained(again)[name]) for name, tensor in trained(trainer).items())
    saved = load_file(tmp_path / "out" / "checkpoint-8" / "weights.safetensors")
    assert any(".trunk." in name for name in saved), "the critic is part of a checkpoint"


def test_an_entropy_bonus_keeps_the_policy_more_random(tmp_path):
    settings = {"phases": 8, "learning_rate": 0.3}
    _, without = run(tmp_path, **settings)
    _, with_bonus = run(tmp_path, entropy_coef=1.0, **settings)
    assert with_bonus[-1]["entropy"] > without[-1]["entropy"]


def test_updates_stop_at_a_kl_and_everything_else_counts_on(tmp_path):
    settings = {"phases": 3, "learning_rate": 0.3, "save_strategy": "steps", "save_steps": 8}
    trainer, rows = run(tmp_path, stop_epochs_kl=0.01, **settings)
    free, all_rows = run(tmp_path, **settings)
    assert [row["updates"] for row in all_rows] == [8, 8, 8]
    assert 1 <= rows[0]["updates"] < 8, "the first update is at KL 0, and 0.3 is too much for all of them"
    assert [row["lr"] for row in rows] == [row["lr"] for row in all_rows] and trainer.state.global_step == 24
    assert rows[0]["approx_kl"] < all_rows[0]["approx_kl"]
    assert rows[0]["reward"] == all_rows[0]["reward"], "the phase's completions are the same"
    again = build_trainer(tmp_path, stop_epochs_kl=0.01, **settings)
    run(tmp_path, stop_epochs_kl=0.01, **settings)  # its checkpoints
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))
    assert all(torch.equal(tensor, trained(again)[name]) for name, tensor in trained(trainer).items())


def test_a_limit_that_is_never_reached_changes_nothing(tmp_path):
    free, _ = run(tmp_path, phases=2)
    limited, rows = run(tmp_path, phases=2, stop_epochs_kl=1e9)
    assert all(torch.equal(tensor, trained(limited)[name]) for name, tensor in trained(free).items())


def test_ppo_takes_groups_too(tmp_path):
    trainer, rows = run(tmp_path, num_generations=4, phases=2)
    assert rows[1]["episodes"] == 16 and trainer.args.num_generations == 4
    ids = [row["prompt"] for row in trainer.train_dataset]
    assert len(set(ids)) >= 4
