"""What PPOTrainer takes for granted of TRL and transformers; a failure here says which seam a new version has moved."""

import inspect

import pytest
import torch
from rl_fixtures import build_trainer, preferences, sequences, tiny_model, weighted, word_tokenizer
from transformers import Trainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput, RepeatSampler, add_fused_lm_head, shuffle_sequence_dict

from saerl_cli.rl.trainers import ppo_math
from saerl_cli.rl.trainers.rollouts import EpochSampler
from saerl_cli.rl.trainers.value import PolicyValueOutput, add_value_head

ROWS = [{"prompt": f"w{i} w{i + 1} w{i + 2}"} for i in range(16)]


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("owner", "name", "expected"),
    [
        (GRPOTrainer, "_get_train_sampler", ["self", "dataset"]),
        (GRPOTrainer, "_tokenize_prompts", ["self", "prompts"]),
        (GRPOTrainer, "_generate_and_score_completions", ["self", "inputs"]),
        (GRPOTrainer, "_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        (GRPOTrainer, "_compute_loss", ["self", "model", "inputs"]),
        (GRPOTrainer, "log", ["self", "logs", "start_time"]),
        (Trainer, "create_optimizer", ["self", "model"]),
        (Trainer, "_clip_grad_norm", ["self", "model"]),
        (Trainer, "_save_checkpoint", ["self", "model", "trial"]),
        (Trainer, "_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        (Trainer, "_load_optimizer_and_scheduler", ["self", "checkpoint"]),
        (Trainer, "_load_scaler", ["self", "checkpoint"]),
        (Trainer, "_sync_replicated_trainable_parameters", ["self", "model"]),
        (Trainer, "_load_rng_state", ["self", "checkpoint"]),
        (GRPOTrainer, "_send_telemetry", ["self"]),
        (GRPOTrainer, "training_step", ["self", "model", "inputs", "num_items_in_batch"]),
        (RLOOTrainer, "_get_train_sampler", ["self", "dataset"]),
        (RLOOTrainer, "_tokenize_prompts", ["self", "prompts"]),
        (RLOOTrainer, "_generate_and_score_completions", ["self", "inputs"]),
        (RLOOTrainer, "_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        (RLOOTrainer, "_compute_loss", ["self", "model", "inputs"]),
        (Trainer, "_get_train_sampler", ["self", "train_dataset"]),
        (SFTTrainer, "compute_loss", ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]),
        (DPOTrainer, "compute_loss", ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]),
        (DPOTrainer, "_prepare_dataset", ["self", "dataset", "processing_class", "args", "dataset_name"]),
    ],
)
def test_overridden_methods_keep_their_signature(owner, name, expected):
    assert parameters(getattr(owner, name)) == expected


def test_trl_says_whether_entropy_is_rewarded():
    """`OnceTrainer` asks before it puts its own head in, whose entropy has no gradient; RLOO has no such bonus."""
    assert "self._entropy_bonus_enabled = " in inspect.getsource(GRPOTrainer.__init__)
    assert "entropy_coef" not in parameters(RLOOConfig)


@pytest.mark.parametrize("owner", [GRPOTrainer, RLOOTrainer])
def test_scoring_begins_with_the_arguments_we_pass_by_position(owner):
    names = parameters(owner._get_per_token_logps_and_entropies)
    assert names[:7] == [
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
    ]  # fmt: skip


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


def test_what_a_generation_returns(tmp_path):
    trainer = build_trainer(tmp_path)
    batch = GRPOTrainer._generate_and_score_completions(trainer, ROWS)
    assert batch.keys() == {
        "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "num_items_in_batch",
        "old_per_token_logps", "ref_per_token_logps",
    }  # fmt: skip
    size, width = batch["completion_ids"].shape
    assert batch["advantages"].shape == (size,) and batch["num_items_in_batch"].ndim == 0
    assert batch["old_per_token_logps"].shape == batch["ref_per_token_logps"].shape == (size, width)
    assert batch["completion_mask"][:, 0].all(), "completions are padded on the right"
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
    assert len(trainer.state_values) == 2, "the policy is scored first, then the reference"


def test_no_old_log_probabilities_where_a_phase_is_one_step(tmp_path):
    trainer = build_trainer(tmp_path, max_steps=3, steps_per_generation=1, num_iterations=1)
    assert "old_per_token_logps" not in GRPOTrainer._generate_and_score_completions(trainer, ROWS)


def test_tensors_we_add_are_shuffled_with_their_rows():
    batch = {"a": torch.arange(8), "b": torch.arange(8)[:, None] * 10.0, "n": torch.tensor(3.0)}
    mixed = shuffle_sequence_dict(batch)
    assert torch.equal(mixed["a"] * 10.0, mixed["b"][:, 0]) and mixed["n"] == 3


def move(trainer):
    """Policy and value head some way from where they start."""
    generator = torch.Generator().manual_seed(2)
    for _, p in trainer.trainable():
        p.data.add_(0.5 * torch.randn(p.shape, generator=generator))


def batch_of(trainer):
    batch = trainer._generate_and_score_completions(ROWS)
    generator = torch.Generator().manual_seed(0)
    batch["old_per_token_logps"] = batch["old_per_token_logps"] + 0.3 * torch.randn(
        batch["old_per_token_logps"].shape, generator=generator
    )
    return batch


def test_advantages_of_every_token_give_our_clipped_surrogate(tmp_path):
    trainer = build_trainer(tmp_path)
    trainer.model.eval()
    batch = batch_of(trainer)
    mask = batch["completion_mask"].float()
    trainer.beta = 0.0
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, batch)
    errors = ppo_math.clipped_surrogate(trainer.passes[-1], batch["old_per_token_logps"], batch["advantages"], 0.2)
    assert batch["advantages"].ndim == 2
    torch.testing.assert_close(loss, (errors * mask).sum() / mask.sum())
    flat = batch | {"advantages": torch.full((16,), 0.7)}
    wide = batch | {"advantages": torch.full_like(mask, 0.7)}
    torch.testing.assert_close(
        GRPOTrainer._compute_loss(trainer, trainer.model, flat), GRPOTrainer._compute_loss(trainer, trainer.model, wide)
    )


@pytest.mark.parametrize("training", [False, True])
def test_our_loss_adds_the_value_loss_and_no_second_kl(tmp_path, training):
    trainer = build_trainer(tmp_path, vf_coef=0.5, beta=0.5)
    trainer.model.eval()
    move(trainer)
    batch = batch_of(trainer)
    trainer.model.train(training)
    tokens = batch["num_items_in_batch"]
    if training:  # one of the four micro-batches of the phase
        batch = {key: x if x.ndim == 0 else x[:4] for key, x in batch.items()}
        trainer.current_gradient_accumulation_steps = 1
        tokens = tokens / 4
    mask = batch["completion_mask"].float()
    loss = trainer._compute_loss(trainer.model, batch)
    policy = ppo_math.clipped_surrogate(trainer.passes[-1], batch["old_per_token_logps"], batch["advantages"], 0.2)
    value = ppo_math.clipped_value_loss(trainer.state_values[-1], batch["old_values"], batch["returns"], 0.2)
    torch.testing.assert_close(loss, ((policy + 0.5 * value) * mask).sum() / tokens)
    assert trainer.beta == trainer.args.beta > 0, "lent to the base class and given back"
    assert (batch["ref_per_token_logps"] - trainer.passes[-1]).abs().max() > 0.01, (
        "else a KL in the loss would not show"
    )


def test_whitened_advantages_follow_from_the_stored_numbers(tmp_path):
    trainer = build_trainer(tmp_path, beta=0.3, missing_eos_penalty=0.5)
    move(trainer)
    batch = trainer._generate_and_score_completions(ROWS)
    mask, ids = batch["completion_mask"], batch["completion_ids"]
    trainer.state_values = []
    torch.testing.assert_close(trainer.score_policy(batch), batch["old_per_token_logps"])
    torch.testing.assert_close(batch["old_values"], trainer.state_values[0] * mask)
    logp, logp_ref, values = batch["old_per_token_logps"], batch["ref_per_token_logps"], batch["old_values"]
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
    torch.testing.assert_close(batch["returns"], (advantages + values) * mask, atol=1e-5, rtol=1e-5)
    kept = advantages[mask.bool()]
    white = (advantages - kept.mean()) / kept.std(unbiased=False) * mask
    torch.testing.assert_close(batch["advantages"], white, atol=1e-4, rtol=1e-4)
    assert (logp - logp_ref).abs().max() > 0.01


def test_the_fused_output_has_no_hidden_state_and_keeps_our_field(tmp_path):
    assert "hidden_states" not in FusedCausalLMOutput.__dataclass_fields__
    model = tiny_model(tmp_path)
    add_fused_lm_head(model, temperature=1.0, outputs=("log_probs", "entropy"))
    head = add_value_head(model)
    ids = torch.arange(2, 12)[None]
    plain = model(input_ids=ids, output_hidden_states=True)
    head.out.weight.data.normal_()
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)
    assert isinstance(out, PolicyValueOutput)
    rebuilt = PolicyValueOutput(**dict(out.items()))  # as DDP does
    torch.testing.assert_close(rebuilt.state_values, head(plain.hidden_states[-1]))
    want = plain.logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(out.log_probs, want, atol=1e-5, rtol=1e-5)
    assert "attention_mask" in inspect.signature(model.forward).parameters, "generate() validates against it"


def test_value_gradients_stay_in_the_head(tmp_path):
    model = tiny_model(tmp_path).requires_grad_(True)
    add_fused_lm_head(model, temperature=1.0)
    head = add_value_head(model, detach=True)
    head.out.weight.data.normal_()
    ids = torch.arange(2, 12)[None]
    model(input_ids=ids, labels=ids, fused_lm_head=True).state_values.sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["v_head.out.weight", "v_head.out.bias"]


def test_prompt_order_is_a_function_of_seed_and_epoch():
    epoch = [0]

    def sampler():
        stock = RepeatSampler(range(10), mini_repeat_count=1, batch_size=4, repeat_count=2, seed=5)
        return EpochSampler(stock, lambda: epoch[0])

    first = list(sampler())
    again = sampler()
    assert list(again) == first == list(again), "however often it was read before"
    assert len(first) == len(again) == 16 and first[:4] == first[4:8]
    epoch[0] = 1
    assert list(sampler()) != first


def test_rows_may_bring_their_token_ids(tmp_path):
    trainer = build_trainer(tmp_path)
    tokenizer = word_tokenizer()
    rows = [{"prompt": f"w{i}", "input_ids": [1, *tokenizer(f"w{i} w1")["input_ids"]]} for i in range(16)]
    batch = trainer._generate_and_score_completions(rows)
    assert batch["prompt_ids"].tolist() == [row["input_ids"] for row in rows]


def test_nothing_is_reported_to_anyone(tmp_path, monkeypatch):
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *a, **k: pytest.fail("telemetry"))
    monkeypatch.delenv("CI", raising=False)
    build_trainer(tmp_path)
