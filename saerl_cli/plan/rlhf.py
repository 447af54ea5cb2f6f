"""`saerl rlhf` and `saerl evaluate` before they run."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy import ndarray
from peft import get_peft_model

from saerl_cli.config.algo import LOGITS_HELD, AlgoKind, Critic
from saerl_cli.config.evaluate import EvaluateConfig
from saerl_cli.config.groups import ModelConfig, ModelKind
from saerl_cli.config.rlhf import PromptKind, RlhfConfig
from saerl_cli.config.train_sae import TrainSaeConfig
from saerl_cli.data.documents import row_length
from saerl_cli.models import context_size
from saerl_cli.plan.meta import Estimate, Sequence, count, language_model, sequence, size, trunk, weights
from saerl_cli.plan.saes import Placed, encoded, of_adapter
from saerl_cli.rewards.kinds import kind_of
from saerl_cli.rl.adapters import adapter_of, count_trained, peft_config
from saerl_cli.rl.runs import run_config, snapshot_files

FILE_PROMPT = 128
"""Tokens of a prompt from a file."""
LOSS_ROWS = 16
"""Held-out rows whose loss is computed at once."""


def adapted(config: RlhfConfig, making: TrainSaeConfig | None) -> tuple[Any, int, dict[str, int], list[Placed]]:
    """The model as it is trained; numbers trained; path -> width where what is trained is added; SAEs."""
    adapter, model = config.adapter, language_model(config.model)
    entry = adapter_of(adapter)
    saes = [] if entry.saes is None else of_adapter(adapter, model.config, making)
    places = {site.module: site.width for site, _ in saes}
    trained = count_trained(adapter, model.config, {site.name: sae.d_sae for site, sae in saes})
    if entry.whole_model:
        model.requires_grad_(True)
    elif not saes:
        loaded: Any = SimpleNamespace(model=model)
        chosen: Any = peft_config(adapter, loaded)
        places = getattr(chosen, "widths", {})  # of our own vectors, whose forward pass knows no meta device
        model = model if places else get_peft_model(model, chosen)
    return model, trained, places, saes


def reward_models(config: RlhfConfig) -> tuple[list[Any], list[str]]:
    """The models that score, and what was assumed: one that is not there yet is as large as the policy."""
    models, notes = [], []
    for path in (str(part.path) for part in config.reward.parts.values() if kind_of(part).model):
        try:
            here = Path(path).is_dir()
            model = ModelConfig(ModelKind.local, path=path) if here else ModelConfig(ModelKind.hub, name=path)
            models.append(language_model(model))
        except ValueError:
            models.append(language_model(config.model))
            notes.append(f"the reward model {path} is not there: taken to be as large as the policy")
    return models, notes


@dataclass
class Policy:
    """The model with its adapter, and a prompt with its completion in it (of sft: a document).

    Attributes:
        above: share of the layers that is not computed once for all passes.
        written: tokens of a completion on average.
        judged: operations of the reward models for a completion.
    """

    config: RlhfConfig
    one: Sequence
    parameters: dict[str, int]
    stays: dict[str, float]
    saes: list[Placed]
    above: float
    prompt: float
    written: float
    judged: float
    notes: list[str]

    def measured(self, samples: float, losses: int) -> tuple[ndarray, float]:
        """So many completions with their KL, and held-out losses; bytes of distributions over the vocabulary."""
        evaluation, one = self.config.evaluation, self.one
        rows, split = losses * evaluation.heldout_tokens / one.tokens, samples / evaluation.batch_size
        work = one.generated(samples, self.prompt, self.written, split) + encoded(self.saes, 2 * samples * one.tokens)
        work += one.passes(2 * samples, self.written, split=2 * split) + np.array([samples * self.judged, 0.0])
        work += one.passes(rows, one.tokens, split=rows / LOSS_ROWS)
        held = one.cache + one.logits * (one.tokens + 5 * self.config.algo.max_new_tokens)
        losing = 3 * LOSS_ROWS * row_length(self.config.data, 512) * one.logits
        return work, max(min(evaluation.batch_size, evaluation.samples) * held, losing)


def policy_of(config: RlhfConfig, making: TrainSaeConfig | None, length: float | None) -> Policy:
    """Build the model with its adapter and count.

    Args:
        config: the settings.
        making: the run that makes SAEs which are not there yet.
        length: tokens of a completion on average.

    Raises:
        ValueError: SAEs or sites that the model lacks.
    """
    algo, launch, base = config.algo, config.launch, language_model(config.model)
    full, context = adapter_of(config.adapter).whole_model, context_size(base.config)
    model, trained, places, saes = adapted(config, making)
    body = count(trunk(base).parameters()) if algo.critic is Critic.separate else 0
    critic = body + base.config.get_text_config().hidden_size + 1 if algo.kind is AlgoKind.ppo else 0
    split = trained / launch.shards if full and launch.shards > 1 else 0.0
    alike = critic + (0 if split else trained)  # in all processes, which average it
    stays = weights(base, launch, 2 if full else 1) | {
        "adapter": 0.0 if full else 4.0 * trained,
        "SAEs": sum(size(sae.parameters()) for _, sae in saes),
        "critic": 4.0 * critic,
        "gradients": 4.0 * (split + alike * (1 + (launch.num_processes > 1))),
        "optimiser": 8.0 * (split + alike),
    }
    (judges, notes), new = reward_models(config), algo.max_new_tokens
    stays["reward models"] = sum(size(trunk(judge).parameters()) for judge in judges)
    from_file = config.prompts.kind is PromptKind.file
    prompt = min(FILE_PROMPT, context - new) if from_file else config.prompts.tokens
    if from_file:
        notes.append(f"prompts of a file are counted as {prompt} tokens")
    if length is None:
        notes.append("completions are counted as algo.max_new_tokens long; --length N says otherwise")
    documents = algo.kind is AlgoKind.sft and algo.examples is None
    one = sequence(model, row_length(config.data, context) if documents else prompt + new, config.model, launch, places)
    kept = min((site.layer or 0 for site, _ in saes), default=-1) + 1 if algo.prefix_cache and algo.samples else 0
    numbers = {"language model": count(base.parameters()), "SAEs": sum(count(sae.parameters()) for _, sae in saes)}
    numbers |= {"trained": trained, "critic": critic}
    judged = sum(sequence(judge, prompt + new, config.model, launch).forward for judge in judges)
    return Policy(
        config, one, numbers, stays, saes, 1 - kept / one.layers, prompt, min(new, length or new), judged, notes
    )  # fmt: skip


def phase(policy: Policy) -> tuple[ndarray, float]:
    """A phase of training, and bytes of a micro-batch's activations and logits, or of keys and values."""
    config, algo, one, above = policy.config, policy.config.algo, policy.one, policy.above
    micro, sides = algo.micro_batch or config.rows_of_a_step, 2 if algo.kind is AlgoKind.dpo else 1
    rows = algo.rollouts if algo.samples else algo.steps * algo.batch_size * sides
    rows = rows / config.launch.num_processes
    split, scored = rows / micro, policy.written if algo.samples else one.tokens
    work = one.passes(rows, scored, True, above, split)
    if algo.activation_checkpointing:
        work += one.passes(rows, part=above, split=split)
    work = work * (algo.epochs if algo.samples else 1) + encoded(policy.saes, 2 * rows * one.tokens)
    if algo.samples or algo.kind is AlgoKind.dpo:  # by the reference
        work += one.passes(rows, scored, part=above, split=split)
    if algo.samples:
        work += one.generated(rows, policy.prompt, policy.written) + one.passes(rows, scored, split=split)
        work[0] += rows * policy.judged
    if algo.critic is Critic.separate:
        critic = sequence(language_model(config.model).requires_grad_(True), one.tokens, config.model, config.launch)
        work += critic.passes(rows) + critic.passes(rows, back=True) * algo.epochs
    saved = one.saved / one.layers * 2 if algo.activation_checkpointing else one.saved
    saved += one.tokens * sum(8 * sae.d_sae for _, sae in policy.saes)
    logits = micro * sides * one.tokens * one.logits
    logits = 3 * logits if algo.kind is AlgoKind.rwr else min(logits, 16.0 * LOGITS_HELD)
    return work, max(micro * sides * saved + logits, rows * algo.samples * (one.cache + 6 * one.logits))


def rlhf(config: RlhfConfig, making: TrainSaeConfig | None, length: float | None) -> Estimate:
    """RLHF."""
    algo, evaluation = config.algo, config.evaluation
    policy = policy_of(config, making, length)
    looks = 2 + ((algo.phases - 1) // evaluation.every if evaluation.every else 0)
    samples = 2 * evaluation.samples + min(evaluation.samples, 256) + looks * evaluation.tracked
    measurement, measuring = policy.measured(samples + algo.draws * (algo.kind is AlgoKind.rwr), 2)
    once, holds = phase(policy)
    each = 4.0 * policy.parameters["trained"]
    usual = 0 if adapter_of(config.adapter).whole_model else 8
    snapshots = min(algo.phases - 1, usual if config.snapshots is None else config.snapshots)
    return Estimate(
        policy.parameters,
        policy.stays,
        policy.one,
        measurement,
        measuring,
        "phases",
        algo.phases,
        once,
        holds,
        {
            "policy": each,
            "snapshots": each * snapshots,
            "checkpoint": 3 * (each + 4.0 * policy.parameters["critic"]),
        },
        policy.notes,
    )


def evaluate(config: EvaluateConfig, length: float | None) -> Estimate:
    """A finished policy measured.

    Raises:
        ValueError: `policy` is no run directory.
    """
    run = replace(run_config(config.policy), evaluation=config.evaluation, launch=config.launch)
    policy = policy_of(run, None, length)
    policies = 2 + (len(snapshot_files(config.policy)) if config.snapshots else 0) + len(config.factors)
    base = config.samples_a_prompt if config.base is None else 0
    work, holds = policy.measured(config.evaluation.samples * (policies + base), policies)
    trained = ("critic", "gradients", "optimiser")
    stays = {name: held for name, held in policy.stays.items() if name not in trained}
    return Estimate(policy.parameters, stays, policy.one, work, holds, notes=policy.notes)
