"""From settings to the pieces of a run: model, reward, prompts, trainer, policy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from saerl_cli.activations import documents, row_length, token_rows
from saerl_cli.adapter import peft_config
from saerl_cli.config.algo import Schedule
from saerl_cli.config.groups import Precision
from saerl_cli.config.rlhf import PromptKind, RlhfConfig
from saerl_cli.models import Loaded, eos_token_ids, load_model
from saerl_cli.rewards.score import Part, Reward, build_reward
from saerl_cli.rl.dictionaries import dictionaries, restraint
from saerl_cli.rl.exact import derived_seed
from saerl_cli.rl.measure import Sampling
from saerl_cli.rl.normalise import Normaliser
from saerl_cli.rl.policy import Policy, plain
from saerl_cli.rl.ppo_config import PPOConfig
from saerl_cli.rl.prompts import Prompt, refuse_too_few
from saerl_cli.rl.questions import choose_prompts, refuse_few_questions
from saerl_cli.rl.trainer import PPOTrainer
from saerl_cli.run.directory import Run

PURPOSES = ("shown", "spread", "summary", "passes")
"""What samples beside training are drawn for, each with a seed of its own."""


@dataclass
class Parts:
    """What a run is made of."""

    config: RlhfConfig
    run: Run
    loaded: Loaded
    reward: Reward
    prompts: list[Prompt]
    heldout_prompts: list[Prompt]
    heldout_rows: Tensor
    """[n, context] packed held-out token ids."""
    saes: dict[str, Path] = field(default_factory=dict)
    """Site -> SAE folder."""

    def sampling(self, purpose: str) -> Sampling:
        """Settings of samples drawn beside training."""
        config = self.config
        seed = derived_seed(config.seed, PURPOSES.index(purpose), 1_000_003)
        return Sampling(config.algo.max_new_tokens, config.algo.temperature, config.evaluation.batch_size, seed)


def build_parts(config: RlhfConfig, run: Run, device: Any) -> Parts:
    """Load the model, build the reward, cut the prompts."""
    loaded = load_model(config.model, device)
    reward = build_reward(config.reward, loaded.tokenizer, device)
    heldout = documents(config.data, config.model, "heldout")
    prompts, heldout_prompts = choose_prompts(config, loaded.tokenizer, loaded.context_size)
    if config.prompts.kind is PromptKind.documents:
        refuse_too_few(len(prompts), config.algo.rollouts, config.prompts.tokens)
    else:
        refuse_few_questions(len(prompts), config.algo.rollouts)
    rows = heldout_rows(config, loaded.context_size, loaded.tokenizer, heldout)
    saes = dictionaries(config.adapter, loaded, rows, run)
    return Parts(config, run, loaded, reward, prompts, heldout_prompts, rows, saes)


def heldout_rows(config: RlhfConfig, context_size: int, tokenizer: Any, heldout: Sequence[str]) -> Tensor:
    """Packed held-out tokens, `evaluation.heldout_tokens` at most; [n, context]."""
    length = row_length(config.data, context_size)
    enough = heldout[: config.evaluation.heldout_tokens]  # a document has a token at least
    return token_rows(enough, tokenizer, length)[: max(1, config.evaluation.heldout_tokens // length)]


def build_trainer(parts: Parts) -> PPOTrainer:
    """The trainer with policy, reference and value head."""
    config, model = parts.config, parts.loaded.model
    chosen = peft_config(config.adapter, parts.loaded, parts.saes)
    if chosen is None:
        model.requires_grad_(True)
    rows = {"prompt": [p.text for p in parts.prompts], "input_ids": [list(p.input_ids) for p in parts.prompts]}
    rows["answer"] = [p.answer for p in parts.prompts]
    trainer = PPOTrainer(
        model=model,
        reward_funcs=[trl_reward(part) for part in parts.reward.parts],
        args=ppo_config(config, parts.run.path, [part.weight for part in parts.reward.parts]),
        train_dataset=Dataset.from_dict(rows),
        processing_class=parts.loaded.tokenizer,
        peft_config=chosen,
        open_checkpoint=parts.run.save_checkpoint,
    )
    trainer.normaliser = Normaliser(config.reward.normalise, config.reward.clip)
    trainer.restraint = restraint(parts, trainer.accelerator.unwrap_model(trainer.model))
    return trainer


def trl_reward(part: Part) -> Callable[..., list[float]]:
    """A part of the reward as TRL calls it."""

    def function(prompts: list, completions: list, completion_ids: list, answer: Any = None, **_: Any) -> list[float]:
        return part(prompts, completions, completion_ids, answer)

    function.__name__ = part.name
    return function


def ppo_config(config: RlhfConfig, path: Path, weights: list[float]) -> PPOConfig:
    """Our settings as the trainer's."""
    algo, launch, on_cpu = config.algo, config.launch, config.launch.cpu or not torch.cuda.is_available()
    minibatch = algo.rollouts // (launch.num_processes * algo.minibatches)  # completions a process and optimiser step
    micro_batch = algo.micro_batch or minibatch
    steps_per_phase = algo.epochs * algo.minibatches
    return PPOConfig(
        output_dir=str(path / "checkpoints"),
        max_steps=algo.phases * steps_per_phase,
        save_strategy="steps",
        save_steps=config.checkpoint_every * steps_per_phase,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=minibatch // micro_batch,
        steps_per_generation=algo.minibatches * minibatch // micro_batch,
        num_iterations=algo.epochs,
        max_completion_length=algo.max_new_tokens,
        temperature=algo.temperature,
        beta=algo.kl_coef,
        kl_target=algo.kl_target,
        kl_horizon=algo.kl_horizon,
        gamma=algo.gamma,
        lam=algo.lam,
        epsilon=algo.cliprange,
        cliprange_value=algo.cliprange_value,
        vf_coef=algo.vf_coef,
        learning_rate=config.adapter.lr,
        value_learning_rate=algo.value_lr,
        weight_decay=config.adapter.weight_decay,
        max_grad_norm=algo.max_grad_norm,
        whiten_advantages=algo.whiten_advantages,
        missing_eos_penalty=algo.missing_eos_penalty,
        critic_warmup=algo.critic_warmup,
        lr_scheduler_type="linear" if algo.schedule is Schedule.linear else "constant",
        reward_weights=weights,
        seed=config.seed,
        bf16=launch.mixed_precision is Precision.bf16,
        fp16=launch.mixed_precision is Precision.fp16,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and launch.num_processes > 1 else None,
        dataloader_pin_memory=not on_cpu,
        disable_tqdm=True,
    )


def policy_of(trainer: PPOTrainer, loaded: Loaded) -> Policy:
    """The trainer's model as something to measure."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    reference = trainer.ref_model and trainer.accelerator.unwrap_model(trainer.ref_model)
    return plain(Policy(model, loaded.tokenizer, eos_token_ids(loaded), loaded.context_size, reference))
