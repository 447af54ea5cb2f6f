"""From settings to the pieces of a run: model, reward, prompts, trainer, policy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor

from saerl_cli.activations import token_rows
from saerl_cli.config.algo import AlgoKind
from saerl_cli.config.rlhf import RlhfConfig
from saerl_cli.data.documents import documents, row_length
from saerl_cli.data.prompts import Prompt, choose_prompts, refuse_too_few
from saerl_cli.models import Loaded, eos_token_ids, load_model
from saerl_cli.rewards.score import Part, Reward, build_reward
from saerl_cli.rl.adapters import adapter_of, peft_config
from saerl_cli.rl.adapters.sparsity import sparsity_of
from saerl_cli.rl.evaluation.measure import Sampling
from saerl_cli.rl.policy import Policy, plain
from saerl_cli.rl.training.arguments import training_arguments
from saerl_cli.rl.training.base import PhasedTrainer
from saerl_cli.rl.training.examples import Examples, build_examples
from saerl_cli.rl.training.normalise import Normaliser
from saerl_cli.rl.training.phase import PPOTrainer
from saerl_cli.rl.training.regression import RWRTrainer, draws
from saerl_cli.rl.training.supervised import DPOTrainer, SFTTrainer
from saerl_cli.run import shards
from saerl_cli.run.directory import Run
from saerl_cli.run.seeds import derived_seed

TRAINERS: dict[AlgoKind, Callable[..., PhasedTrainer]] = {
    AlgoKind.ppo: PPOTrainer,
    AlgoKind.grpo: PPOTrainer,
    AlgoKind.rloo: PPOTrainer,
    AlgoKind.sft: SFTTrainer,
    AlgoKind.dpo: DPOTrainer,
    AlgoKind.rwr: RWRTrainer,
}
COPYING = (AlgoKind.sft, AlgoKind.rwr)
"""Algorithms that TRL gives no reference, so that they copy the model themselves."""
PURPOSES = ("shown", "spread", "summary", "passes")
"""What samples beside training are drawn for, each with a seed of its own."""


@dataclass
class RlhfSetup:
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
    examples: Examples | None = None
    """What supervised algorithms learn from."""

    def sampling(self, purpose: str) -> Sampling:
        """Settings of samples drawn beside training."""
        config = self.config
        seed = derived_seed(config.seed, PURPOSES.index(purpose), 1_000_003)
        return Sampling(config.algo.max_new_tokens, config.algo.temperature, config.evaluation.batch_size, seed)


def build_setup(config: RlhfConfig, run: Run, device: Any) -> RlhfSetup:
    """Load the model, build the reward, cut the prompts."""
    loaded = load_model(config.model, device, config.launch)
    reward = build_reward(config.reward, loaded.tokenizer, device)
    heldout = documents(config.data, config.model, "heldout")
    prompts, heldout_prompts = choose_prompts(config, loaded.tokenizer, loaded.context_size)
    refuse_too_few(len(prompts), config.algo, config.prompts)
    rows = heldout_rows(config, loaded.context_size, loaded.tokenizer, heldout)
    find_saes = adapter_of(config.adapter).saes
    saes = {} if find_saes is None else find_saes(config.adapter, loaded, rows, run)
    examples = None
    if config.algo.kind is AlgoKind.rwr:
        drawn = draws(config, run, loaded.model, loaded.tokenizer, eos_token_ids(loaded), prompts, reward)
        examples = Examples(drawn, drawn.select([]))
    elif not config.algo.samples:
        examples = build_examples(config, loaded)
    return RlhfSetup(config, run, loaded, reward, prompts, heldout_prompts, rows, saes, examples)


def heldout_rows(config: RlhfConfig, context_size: int, tokenizer: Any, heldout: Sequence[str]) -> Tensor:
    """Packed held-out tokens, `evaluation.heldout_tokens` at most; [n, context]."""
    length = row_length(config.data, context_size)
    enough = heldout[: config.evaluation.heldout_tokens]  # a document has a token at least
    return token_rows(enough, tokenizer, length)[: max(1, config.evaluation.heldout_tokens // length)]


def build_trainer(setup: RlhfSetup) -> PhasedTrainer:
    """The algorithm's trainer, with policy and reference."""
    config, model = setup.config, setup.loaded.model
    chosen = peft_config(config.adapter, setup.loaded, setup.saes)
    given: dict[str, Any] = {}
    if chosen is None and config.launch.shards > 1 and config.algo.kind in COPYING:
        given["frozen"] = load_model(config.model, None, config.launch).model
    if chosen is None:
        model.requires_grad_(True)
    trainer = TRAINERS[config.algo.kind](
        model=model,
        args=training_arguments(config, setup.run.path, [part.weight for part in setup.reward.parts]),
        processing_class=setup.loaded.tokenizer,
        peft_config=chosen,
        open_checkpoint=setup.run.save_checkpoint,
        **(rollout_data(setup) if setup.examples is None else {"train_dataset": setup.examples.train}),
        **given,
    )
    if config.launch.shards > 1 and trainer.ref_model is not None and not given:
        shards.join(trainer.ref_model, config.launch.gather_for_sampling)
    if isinstance(trainer, PPOTrainer):
        trainer.normaliser = Normaliser(config.reward.normalise, config.reward.clip)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    trainer.sparsity = sparsity_of(config.adapter, setup.saes, policy, setup.loaded, setup.heldout_rows, setup.run)
    return trainer


def rollout_data(setup: RlhfSetup) -> dict[str, Any]:
    """The prompts, and what scores their completions."""
    rows = {"prompt": [p.text for p in setup.prompts], "input_ids": [list(p.input_ids) for p in setup.prompts]}
    rows["answer"] = [p.answer for p in setup.prompts]
    rewards = [trl_reward(part) for part in setup.reward.parts]
    return {"train_dataset": Dataset.from_dict(rows), "reward_funcs": rewards}


def trl_reward(part: Part) -> Callable[..., list[float]]:
    """A part of the reward as TRL calls it."""

    def function(prompts: list, completions: list, completion_ids: list, answer: Any = None, **_: Any) -> list[float]:
        return part(prompts, completions, completion_ids, answer)

    function.__name__ = part.name
    return function


def policy_of(trainer: PhasedTrainer, loaded: Loaded) -> Policy:
    """The trainer's model as something to measure."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    reference = trainer.ref_model and trainer.accelerator.unwrap_model(trainer.ref_model)
    return plain(Policy(model, loaded.tokenizer, eos_token_ids(loaded), loaded.context_size, reference))
