"""PPOTrainer: what moves, what does not, exact resume, equal results however a phase is split, learning, stopping."""

import json
import math

import pytest
import torch
from rl_fixtures import WORDS, build_trainer, good_share, prompts, tiny_model, trained, word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
)

from saerl_cli.rl.proof import all_tensors, frozen_hashes
from saerl_cli.rl.rollouts.batch import Sequences
from saerl_cli.rl.rollouts.scoring import is_value_parameter
from saerl_cli.rl.training.base import Diverged

TIMES = {"seconds", "tokens_per_second", "samples_per_second"}


def run(folder, **settings):
    rows = []
    trainer = build_trainer(folder, on_phase=rows.append, **settings)
    trainer.train()
    return trainer, rows


@pytest.mark.parametrize(
    ("adapter", "splice"),
    [
        ("sparse_coeffs", "error_preserving"),
        ("sparse_coeffs", "reconstruct"),
        ("sparse_coeffs", "pre_activation"),
        ("full", "error_preserving"),
    ],
)
def test_only_what_is_named_moves_and_kl_starts_at_zero(tmp_path, adapter, splice):
    rows = []
    trainer = build_trainer(tmp_path, adapter, splice, on_phase=rows.append)
    before = {name: tensor.detach().clone() for name, tensor in all_tensors(trainer)}
    hashes, moving = frozen_hashes(trainer), {name for name, _ in trainer.trainable()}
    trainer.train()
    changed = {name for name, tensor in all_tensors(trainer) if not torch.equal(tensor, before[name])}
    assert changed <= moving and hashes == frozen_hashes(trainer)
    if adapter == "sparse_coeffs":
        kinds = {"sparse_coeffs_delta", "v_head"} | ({"sparse_coeffs_bias"} if splice == "pre_activation" else set())
        assert {kind for kind in kinds if any(kind in name for name in changed)} == kinds
        assert all("default" in name or is_value_parameter(name) for name in moving)
    assert rows[0]["kl"] == 0 == rows[0]["kl_k3"] == rows[0]["kl_exact"] and rows[-1]["kl_k3"] > 0
    assert [row["phase"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(value) for row in rows for value in row.values())


@pytest.mark.parametrize("adapter", ["sparse_coeffs", "full"])
def test_resume_is_exact_inside_and_across_epochs(tmp_path, adapter):
    saving = {"save_strategy": "steps", "save_steps": 8, "kl_target": 1.0, "kl_gain": 2.0}
    data = {"train_dataset": prompts(40)}  # 2 phases an epoch, the rest dropped
    whole, rows = run(tmp_path, adapter=adapter, phases=6, **saving, **data)
    want = trained(whole)
    for step in (8, 16, 24):
        again, tail = [], []
        again = build_trainer(tmp_path, adapter, phases=6, on_phase=tail.append, **saving, **data)
        again.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        got = trained(again)
        assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
        strip = [{k: v for k, v in row.items() if k not in TIMES} for row in tail]
        assert strip == [{k: v for k, v in row.items() if k not in TIMES} for row in rows[step // 8 :]]
    assert len({row["kl_coef"] for row in rows}) > 1, "the adaptive coefficient must be part of what is compared"


def test_checkpoint_holds_no_pickle_and_no_frozen_weight(tmp_path):
    trainer, _ = run(tmp_path, save_strategy="steps", save_steps=8)
    folder = tmp_path / "out" / "checkpoint-24"
    assert {f.name for f in folder.iterdir()} == {
        "weights.safetensors", "optimizer.safetensors", "state.json", "trainer_state.json",
    }  # fmt: skip
    trainable = sum(p.numel() for _, p in trainer.trainable())
    assert (folder / "weights.safetensors").stat().st_size < 4 * trainable + 2_000


def test_checkpoint_of_another_geometry_is_refused(tmp_path):
    run(tmp_path, save_strategy="steps", save_steps=8)
    other = build_trainer(tmp_path, phases=4)
    with pytest.raises(ValueError, match="made with max_steps=24, this run has 32"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-8"))


def test_damaged_checkpoint_is_refused(tmp_path):
    run(tmp_path, save_strategy="steps", save_steps=8)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "out" / "checkpoint-8" / "weights.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, file)
    with pytest.raises(ValueError, match="is not finite"):
        build_trainer(tmp_path).train(resume_from_checkpoint=str(file.parent))


@pytest.mark.parametrize("adapter", ["sparse_coeffs", "full"])
def test_micro_batches_add_up_to_the_minibatch(tmp_path, adapter):
    whole, rows = run(tmp_path, adapter=adapter, phases=1, max_grad_norm=1e9)
    split, rows_split = run(
        tmp_path, adapter=adapter, phases=1, max_grad_norm=1e9, per_device_train_batch_size=1, steps_per_generation=16,
        gradient_accumulation_steps=4,
    )  # fmt: skip
    for (name, a), (_, b) in zip(whole.trainable(), split.trainable(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4, msg=name)
    for key in rows[0].keys() - TIMES:
        assert rows[0][key] == pytest.approx(rows_split[0][key], rel=1e-3, abs=1e-5), key


def test_one_optimiser_step_a_phase(tmp_path):
    trainer, rows = run(tmp_path, max_steps=3, steps_per_generation=1, num_iterations=1, per_device_train_batch_size=16)
    assert [row["phase"] for row in rows] == [1, 2, 3]
    assert rows[0]["ratio_deviation"] < 1e-5, "the only step is on the policy that sampled"


def test_temperature_scales_sampling_and_scoring_alike(tmp_path):
    trainer = build_trainer(tmp_path, temperature=0.5)
    trainer.begin_phase()
    (batch,) = trainer.rollout([{"prompt": "w1 w2 w3"}, {"prompt": "w4 w5 w6"}])
    (ids, _), batch = batch.rollout.joined(), batch.rollout
    width = batch.mask.shape[1]
    logits = tiny_model(tmp_path / "model")(ids).logits[:, -width - 1 : -1]
    want = (logits / 0.5).log_softmax(-1).gather(-1, batch.completion_ids[..., None]).squeeze(-1)
    mask = batch.mask.bool()
    torch.testing.assert_close(batch.logp[mask], want[mask], atol=1e-5, rtol=1e-5)


def padded_and_not():
    """The same three scored tokens, with and without padding on the left."""
    prompt, tokens = torch.tensor([[2, 3, 4]]), torch.tensor([[5, 6, 7]])
    padding, ones = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 3, dtype=torch.long)
    alone = Sequences(prompt, ones, tokens, ones)
    return alone, Sequences(torch.cat([padding, prompt], 1), torch.cat([padding, ones], 1), tokens, ones)


def test_left_padding_changes_no_log_probability(tmp_path):
    trainer = build_trainer(tmp_path)
    for _, p in trainer.trainable():
        p.data.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.1)
    with torch.no_grad():
        alone, together = (trainer.score(trainer.model, texts) for texts in padded_and_not())
    torch.testing.assert_close(alone.logp, together.logp, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(alone.values, together.values, atol=1e-6, rtol=1e-5)


def gpt2():
    """Learned positions."""
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": len(WORDS)}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, pad_token_id=0))


def llama():
    """Rotary positions, a sequential residual."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(WORDS), bos_token_id=1, eos_token_id=1, pad_token_id=0))


@pytest.mark.parametrize("algo", ["ppo", "grpo", "rloo"])
@pytest.mark.parametrize("architecture", [gpt2, llama])
def test_left_padding_changes_nothing_in_other_architectures_either(tmp_path, architecture, algo):
    torch.manual_seed(0)
    architecture().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    trainer = build_trainer(tmp_path, "full", model=model, algo=algo)
    with torch.no_grad():
        alone, together = (trainer.score(trainer.model, texts).logp for texts in padded_and_not())
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)


def test_missing_end_is_punished_by_any_end_token(tmp_path):
    fixed = []

    def score_nothing(completion_ids, **_):
        fixed.extend(completion_ids)
        return [0.0] * len(completion_ids)

    rows = []
    trainer = build_trainer(
        tmp_path, reward=score_nothing, missing_eos_penalty=2.0, phases=1, on_phase=rows.append, beta=1e-9
    )
    trainer.eos_token_ids = [1, 20]
    trainer.train()
    ended = sum(ids[-1] in (1, 20) for ids in fixed) / len(fixed)
    assert 0 < ended < 1 and any(ids[-1] == 20 for ids in fixed)
    assert rows[0]["ended"] == pytest.approx(ended)
    assert rows[0]["reward_with_kl"] == pytest.approx(-2 * (1 - ended))


def test_learns_the_planted_reward_and_not_a_shuffled_one(tmp_path):
    settings = {"phases": 25, "per_device_train_batch_size": 8, "learning_rate": 0.3, "beta": 0.01}
    _, rows = run(tmp_path, **settings)
    first, last = rows[0]["reward"], sum(row["reward"] for row in rows[-3:]) / 3
    assert last > first + 0.1, f"no learning: {first:.3f} -> {last:.3f}"
    generator = torch.Generator().manual_seed(0)

    def noise(completion_ids, **_):
        return torch.rand(len(completion_ids), generator=generator).tolist()

    trainer, _ = run(tmp_path, reward=noise, **settings)
    trainer.begin_phase()
    shares = good_share(trainer.sample(trainer.tokenize([{"prompt": f"w{i} w{i + 1} w1"} for i in range(29)] * 4)))
    assert sum(shares) / len(shares) < last - 0.05, (
        "a reward without information must not teach what the planted one does"
    )


def test_critic_warmup_moves_the_value_head_alone(tmp_path):
    trainer = build_trainer(tmp_path, critic_warmup=2, phases=2)
    before = trained(trainer)
    trainer.train()
    for name, after in trainer.trainable():
        assert torch.equal(after, before[name]) != is_value_parameter(name), name


def test_norms_are_clipped_apart(tmp_path):
    trainer = build_trainer(tmp_path, max_grad_norm=0.5)
    trainer.create_optimizer()
    for name, p in trainer.trainable():
        p.grad = torch.full_like(p, 100.0 if is_value_parameter(name) else 1e-3)
    trainer._clip_grad_norm(trainer.model)
    policy, head = (group["params"] for group in trainer.optimizer.param_groups)
    assert all(p.grad.eq(1e-3).all() for p in policy), "a large critic gradient must not shrink the policy's"
    assert torch.cat([p.grad.flatten() for p in head]).norm().item() == pytest.approx(0.5, rel=1e-4)


def test_two_learning_rates(tmp_path):
    trainer = build_trainer(tmp_path, learning_rate=0.03, value_learning_rate=0.002, weight_decay=0.1)
    policy, head = trainer.create_optimizer().param_groups
    assert (policy["lr"], head["lr"]) == (0.03, 0.002) and (policy["weight_decay"], head["weight_decay"]) == (0.1, 0)
    assert [p.shape for p in policy["params"]] == [torch.Size([64])]


@pytest.mark.parametrize("where", ["reward", "parameter", "gradient"])
def test_nan_stops_the_run_naming_the_phase_and_keeps_the_checkpoint(tmp_path, where):
    calls = []

    def reward(completion_ids, **_):
        calls.append(1)
        bad = where == "reward" and len(calls) == 2
        return [float("nan") if bad else 0.5 * (i % 2) for i in range(len(completion_ids))]

    class Break(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if where == "gradient" and state.global_step == 11:
                next(trainer.trainable())[1].data.view(-1)[0] = float("nan")

        def on_optimizer_step(self, args, state, control, **kwargs):
            if where == "parameter" and state.global_step == 15:  # the last of phase 2
                next(trainer.trainable())[1].data.view(-1)[0] = float("nan")

    trainer = build_trainer(tmp_path, reward=reward, save_strategy="steps", save_steps=8)
    trainer.add_callback(Break())
    with pytest.raises(Diverged, match=r"phase 2 \(optimiser step \d+\): .* is not finite"):
        trainer.train()
    kept = [path.name for path in (tmp_path / "out").iterdir()]
    assert kept == ["checkpoint-8"]


def test_too_few_prompts_are_refused_with_both_numbers(tmp_path):
    with pytest.raises(ValueError, match="there are 15 prompts, but one phase takes 16"):
        build_trainer(tmp_path, train_dataset=prompts(15))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, "beta must be > 0"),
        ({"save_strategy": "steps", "save_steps": 12}, "save_steps must be a multiple of 8"),
        ({"max_steps": 20}, "max_steps must be a multiple of 8"),
        ({"loss_type": "grpo"}, "loss_type has no effect"),
        ({"mask_truncated_completions": True}, "mask_truncated_completions has no effect"),
        ({"algorithm": "reinforce"}, "algorithm must be ppo, grpo or rloo"),
        ({"disable_dropout": False}, "one distribution"),
        ({"gradient_accumulation_steps": 3}, "multiple of gradient_accumulation_steps"),
        ({"per_device_train_batch_size": 1, "steps_per_generation": 1}, "at least two completions"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        build_trainer(tmp_path, **settings)


def test_settings_that_came_with_the_model_do_not_bend_sampling(tmp_path):
    model = tiny_model(tmp_path / "model")
    model.generation_config.suppress_tokens = [5]
    model.generation_config.no_repeat_ngram_size = 2
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    trainer = build_trainer(tmp_path)
    own = trainer.model.get_base_model().generation_config
    assert own.suppress_tokens is None and not own.no_repeat_ngram_size
    state = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert state["suppress_tokens"] == [5]
