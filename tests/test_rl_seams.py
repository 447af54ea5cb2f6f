"""What the trainers do with TRL's and transformers' parts: losses, advantages and tensors are what they are called.

Names and parameters of those parts: `test_private_names.py`.
"""

import inspect

import pytest
import torch
from rl_fixtures import build_trainer, preferences, sequences, tiny_model, weighted, word_tokenizer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput, RepeatSampler, add_fused_lm_head

from saerl_cli.rl.rollouts.batch import MicroBatch
from saerl_cli.rl.rollouts.scoring import ScoredOutput, add_critic, add_scoring_head
from saerl_cli.rl.training import losses
from saerl_cli.rl.training.base import EpochOrder
from saerl_cli.run.seeds import derived_seed

ROWS = [{"prompt": f"w{i} w{i + 1} w{i + 2}"} for i in range(16)]


def test_the_loss_divides_itself_by_the_accumulation_steps():
    assert GRPOTrainer.loss_is_scaled_for_ga is True


def test_tokenised_rows_are_taken_as_they_are(tmp_path):
    sft, dpo = build_trainer(tmp_path, algo="sft"), build_trainer(tmp_path, algo="dpo")
    assert sft.train_dataset.column_names == ["input_ids", "labels"]
    assert sft.train_dataset[0]["input_ids"] == sequences()[0]["input_ids"]
    batch = dpo.data_collator([preferences()[0], preferences()[5]])
    pair = preferences()[5]
    length = len(pair["prompt_ids"] + pair["chosen_ids"])
    assert batch["input_ids"][1, :length].tolist() == pair["prompt_ids"] + pair["chosen_ids"], "chosen rows come first"
    assert batch["completion_mask"][1].sum() == len(pair["chosen_ids"])


def test_the_loss_of_reward_weighted_regression_is_what_it_is_called(tmp_path):
    trainer = build_trainer(tmp_path, algo="rwr", temperature=0.7, longest=4)
    move(trainer)
    trainer.model.eval()
    rows = [weighted()[i] for i in range(5)]
    total = 0.0
    for row in rows:  # one at a time, without padding
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        logp = (trainer.model(input_ids=ids).logits[0, :-1] / 0.7).log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        total -= row["weight"] * logp[-len(row["completion_ids"]) :].sum()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    torch.testing.assert_close(loss, total / 5 / 4)


def test_the_losses_of_sft_and_dpo_are_what_they_are_called(tmp_path):
    sft, dpo = build_trainer(tmp_path, algo="sft"), build_trainer(tmp_path, algo="dpo", beta=0.3)
    for trainer in (sft, dpo):
        move(trainer)
        trainer.model.eval()
    rows = [sequences()[i] for i in range(4)]
    batch = sft.data_collator(rows)
    logits = sft.model(input_ids=batch["input_ids"]).logits[:, :-1]
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(sft.compute_loss(sft.model, batch), want)
    pairs = [preferences()[i] for i in range(4)]
    margins = []
    for pair in pairs:
        gains = []
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([pair["prompt_ids"] + pair[side]])

            def logp(ids=ids, side=side, pair=pair):
                logs = dpo.model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
                return logs[:, -len(pair[side]) :].sum()

            policy = logp()
            with dpo.model.disable_adapter():
                gains.append(policy - logp())
        margins.append(gains[0] - gains[1])
    want = -torch.nn.functional.logsigmoid(0.3 * torch.stack(margins)).mean()
    torch.testing.assert_close(dpo.compute_loss(dpo.model, dpo.data_collator(pairs)), want, atol=1e-5, rtol=1e-4)


def test_one_generation_a_prompt_is_what_the_config_refuses(tmp_path):
    with pytest.raises(ValueError, match="at least 2 generations"):
        GRPOConfig(str(tmp_path), num_generations=1, use_cpu=True, bf16=False, activation_checkpointing=False)


def move(trainer):
    """Policy and value head some way from where they start."""
    generator = torch.Generator().manual_seed(2)
    for _, p in trainer.trainable():
        p.data.add_(0.5 * torch.randn(p.shape, generator=generator))


def rollout_of(trainer, rows=ROWS):
    """A phase's completions as one micro-batch of everything."""
    trainer.begin_phase()
    (whole,) = trainer.rollout(rows)
    return whole


def loss_of(trainer, batch):
    with trainer.until_backward:
        return trainer.compute_loss(trainer.model, batch)


@pytest.mark.parametrize("algo", ["ppo", "grpo", "rloo"])
@pytest.mark.parametrize("split", [1, 4])
def test_the_loss_is_what_it_is_called(tmp_path, algo, split):
    whole = {"per_device_train_batch_size": 16, "steps_per_generation": 1, "num_iterations": 8}
    trainer = build_trainer(tmp_path, algo=algo, vf_coef=0.5, beta=0.5, entropy_coef=0.3, **whole)
    rows = [{"prompt": f"w{i // 4} w{i // 4 + 1} w3"} for i in range(16)]
    batch = rollout_of(trainer, rows)
    move(trainer)
    generator = torch.Generator().manual_seed(0)
    old = batch.rollout
    old.logp += 0.3 * torch.randn(old.logp.shape, generator=generator)
    trainer.current_gradient_accumulation_steps = 1
    mask, now = old.mask, trainer.score(trainer.model, old)
    tokens = mask.sum()
    if algo == "rloo":
        ratio = ((now.logp - old.logp) * mask).sum(1).exp()
        a = old.advantages[:, 0]
        want = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
    else:
        ratio = (now.logp - old.logp).exp()
        policy = -torch.min(ratio * old.advantages, ratio.clamp(0.8, 1.2) * old.advantages)
        if algo == "grpo":
            policy = policy + 0.5 * (torch.expm1(old.logp_ref - now.logp) - (old.logp_ref - now.logp))
        want = (policy * mask).sum() / tokens
    if algo == "ppo":
        value = losses.clipped_value_loss(now.values, old.values, old.returns, 0.2)
        want = want + 0.5 * (value * mask).sum() / tokens
    want = want - 0.3 * (now.entropy * mask).sum() / tokens
    assert (old.logp_ref - now.logp).abs().max() > 0.01 and now.entropy.requires_grad
    if split == 1:
        torch.testing.assert_close(loss_of(trainer, batch), want)
        return
    parts = [old.rows(rows) for rows in torch.arange(16).split(4)]  # of the same optimiser step
    trainer.current_gradient_accumulation_steps, trainer.args.steps_per_generation = 4, 4
    frozen = [{name: kept[4 * i : 4 * i + 4] for name, kept in batch.frozen.items()} for i in range(4)]
    total = sum(loss_of(trainer, MicroBatch(part, kept)) for part, kept in zip(parts, frozen, strict=True))
    torch.testing.assert_close(total, want, atol=1e-6, rtol=1e-5)


def test_whitened_advantages_follow_from_the_stored_numbers(tmp_path):
    whole = {"per_device_train_batch_size": 16, "steps_per_generation": 1}
    trainer = build_trainer(tmp_path, beta=0.3, missing_eos_penalty=0.5, **whole)
    move(trainer)
    batch = rollout_of(trainer).rollout
    mask, ids = batch.mask, batch.completion_ids
    with torch.no_grad():
        again = trainer.score(trainer.model, batch)
    torch.testing.assert_close(again.logp, batch.logp)
    torch.testing.assert_close(batch.values, again.values * mask)
    logp, logp_ref, values = batch.logp, batch.logp_ref, batch.values
    advantages = torch.zeros_like(values)
    for b in range(16):  # the same in plain loops
        length = int(mask[b].sum())
        row = ids[b, :length].tolist()
        score = sum(2 <= token < 12 for token in row) / length - 0.5 * (1 not in row)
        running = 0.0
        for t in reversed(range(length)):
            reward = -0.3 * float(logp[b, t] - logp_ref[b, t]) + (score if t == length - 1 else 0.0)
            following = float(values[b, t + 1]) if t + 1 < length else 0.0
            running = reward + following - float(values[b, t]) + 0.95 * running
            advantages[b, t] = running
    torch.testing.assert_close(batch.returns, (advantages + values) * mask, atol=1e-5, rtol=1e-5)
    kept = advantages[mask.bool()]
    white = (advantages - kept.mean()) / kept.std(unbiased=False) * mask
    torch.testing.assert_close(batch.advantages, white, atol=1e-4, rtol=1e-4)
    assert (logp - logp_ref).abs().max() > 0.01


@pytest.mark.parametrize("algo", ["grpo", "rloo"])
def test_advantages_of_a_group_follow_from_its_scores(tmp_path, algo):
    trainer = build_trainer(tmp_path, algo=algo, beta=0.3, per_device_train_batch_size=16, steps_per_generation=1)
    move(trainer)
    batch = rollout_of(trainer, [{"prompt": f"w{i // 4} w{i // 4 + 1} w3"} for i in range(16)]).rollout
    groups = {}
    for b in range(16):
        length = int(batch.mask[b].sum())
        score = sum(2 <= token < 12 for token in batch.completion_ids[b, :length].tolist()) / length
        if algo == "rloo":
            score -= 0.3 * float(((batch.logp - batch.logp_ref) * batch.mask)[b].sum())
        groups.setdefault(tuple(batch.prompt_ids[b].tolist()), []).append((score, float(batch.advantages[b, 0])))
    assert sorted(map(len, groups.values())) == [4, 4, 4, 4]
    for members in groups.values():
        scores = torch.tensor([score for score, _ in members])
        if algo == "grpo":
            want = (scores - scores.mean()) / (scores.std() + 1e-4)
        else:
            want = torch.stack([s - (scores.sum() - s) / 3 for s in scores])
        torch.testing.assert_close(torch.tensor([a for _, a in members]), want, atol=1e-4, rtol=1e-4)


def test_the_fused_output_has_no_hidden_state_and_keeps_our_field(tmp_path):
    assert "hidden_states" not in FusedCausalLMOutput.__dataclass_fields__
    model = tiny_model(tmp_path)
    add_fused_lm_head(model, temperature=1.0, outputs=("log_probs", "entropy"))
    head = add_critic(model)
    add_scoring_head(model, 1.0)
    ids = torch.arange(2, 12)[None]
    plain = model(input_ids=ids, output_hidden_states=True)
    head.out.weight.data.normal_()
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)
    assert isinstance(out, ScoredOutput)
    rebuilt = ScoredOutput(**dict(out.items()))  # as DDP does
    torch.testing.assert_close(rebuilt.state_values, head(plain.hidden_states[-1]))
    want = plain.logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(out.log_probs, want, atol=1e-5, rtol=1e-5)
    assert "attention_mask" in inspect.signature(model.forward).parameters, "generate() validates against it"


def test_value_gradients_stay_in_the_head(tmp_path):
    model = tiny_model(tmp_path).requires_grad_(True)
    add_fused_lm_head(model, temperature=1.0)
    head = add_critic(model)
    add_scoring_head(model, 1.0, detach=True)
    head.out.weight.data.normal_()
    ids = torch.arange(2, 12)[None]
    model(input_ids=ids, labels=ids, fused_lm_head=True).state_values.sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["v_head.out.weight", "v_head.out.bias"]


def test_prompts_come_in_the_order_of_trl_s_sampler_which_depends_on_seed_and_epoch():
    epoch = [0]
    order = EpochOrder(10, 4, 5, lambda: epoch[0], group=3, repeats=2)
    stock = RepeatSampler(range(10), mini_repeat_count=3, batch_size=4, repeat_count=2, seed=5)
    first = list(order)
    stock.generator.manual_seed(derived_seed(5, 0))
    assert list(order) == first == list(stock), "however often it was read before"
    assert len(order) == len(first) == 2 * 4 * 3 * 2
    epoch[0] = 1
    assert list(order) != first


def test_rows_may_bring_their_token_ids(tmp_path):
    trainer = build_trainer(tmp_path)
    tokenizer = word_tokenizer()
    rows = [{"prompt": f"w{i}", "input_ids": [1, *tokenizer(f"w{i} w1")["input_ids"]]} for i in range(16)]
    assert trainer.tokenize(rows) == [row["input_ids"] for row in rows]


def test_nothing_is_reported_to_anyone(tmp_path, monkeypatch):
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *a, **k: pytest.fail("telemetry"))
    monkeypatch.delenv("CI", raising=False)
    build_trainer(tmp_path)
