"""`saerl rlhf`: RLHF of a frozen language model by SAE coefficients or another adapter, or of the whole model."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saerl_cli.config.algo import AlgoKind
from saerl_cli.config.reward import Match, Normalise
from saerl_cli.config.rlhf import PromptKind, RlhfConfig
from saerl_cli.data.examples import read_examples, training_documents
from saerl_cli.data.pairs import read_pairs
from saerl_cli.data.prompts import check_prompts, split_questions
from saerl_cli.models import context_size, describe, light_encoder
from saerl_cli.rewards.kinds import kind_of
from saerl_cli.rewards.patterns import last_number
from saerl_cli.rewards.score import check_reward
from saerl_cli.rl.adapters import adapter_of
from saerl_cli.run import shards
from saerl_cli.run.directory import Run
from saerl_cli.run.processes import process_group
from saerl_cli.run.progress import say, task_bars

if TYPE_CHECKING:
    from saerl_cli.rl.build import RlhfSetup
    from saerl_cli.rl.policy import Policy
    from saerl_cli.rl.training.base import PhasedTrainer


def check(config: RlhfConfig) -> None:
    """Refuse a run that cannot work.

    Raises:
        ValueError: one line saying what is wrong and what to write instead.
    """
    check_reward(config.reward)
    description = describe(config.model)
    adapter_of(config.adapter).check(config.adapter, config.model, description)
    check_answers(config)
    check_prompts(config, light_encoder(config.model), context_size(description))
    check_examples(config)


def check_answers(config: RlhfConfig) -> None:
    """Refuse a verifier whose prompts have no answers.

    Raises:
        ValueError: naming the part, and the first prompt without a usable answer.
    """
    setup = config.reward.parts.items()
    needing = {name: part for name, part in setup if (answers := kind_of(part).answers) and answers(part)}
    if not needing:
        return
    name = next(iter(needing))
    if config.prompts.kind is PromptKind.documents:
        raise ValueError(
            f"reward.parts.{name} verifies answers, and documents have none; write prompts.kind=arithmetic, or"
            " prompts.kind=file prompts.path=FILE with answers"
        )
    numeric = any(part.match is Match.numeric for part in needing.values())
    for question in (q for questions in split_questions(config) for q in questions):
        if question.answer is None:
            problem = f"has no {config.prompts.answer_field!r}; write prompts.answer_field=COLUMN"
        elif numeric and last_number(question.answer) is None:
            problem = f"has the answer {question.answer[:40]!r}, which holds no number; write match=exact"
        else:
            continue
        raise ValueError(f"reward.parts.{name} verifies answers, but the prompt {question.prompt[:60]!r} {problem}")


def check_examples(config: RlhfConfig) -> None:
    """Refuse preference pairs, or examples of sft, that cannot be read."""
    algo = config.algo
    if algo.kind is AlgoKind.dpo:
        read_pairs(algo.pairs, config.model, "heldout")
    if algo.examples is not None:
        read_examples(algo.examples)
    if algo.attribute is not None:
        training_documents(config.data, config.model, algo.attribute, "heldout")


def work(config: RlhfConfig, run: Run, accelerator: Any) -> float:
    """Train, prove the restriction, save, measure; returns what a sweeper optimises, the reward after training.

    Raises:
        ValueError: what only loading can find out, a frozen tensor that moved, or (`Diverged`) a number that is not
            finite.
    """
    from saerl_cli.models import quiet_transformers

    with quiet_transformers():
        return train_and_measure(config, run, accelerator)


def train_and_measure(config: RlhfConfig, run: Run, accelerator: Any) -> float:
    """What `work` does."""
    from saerl_cli.rl.build import build_setup, build_trainer, policy_of
    from saerl_cli.rl.outcome import objective
    from saerl_cli.rl.proof import frozen_hashes, refuse_moved
    from saerl_cli.rl.save import save_policy
    from saerl_cli.rl.summary import summarise
    from saerl_cli.rl.track import sample_untouched

    setup = build_setup(config, run, accelerator.device)
    trainer = build_trainer(setup)
    policy = policy_of(trainer, setup.loaded)
    record_inputs(setup, trainer)
    record_insertion(setup, trainer)
    shards.barrier()
    frozen = frozen_hashes(trainer)
    checkpoint = run.latest_checkpoint()
    if checkpoint is None:
        run.truncate(-1)  # what an attempt that left no checkpoint has written
        sample_untouched(setup, policy)
    shards.barrier()
    calibrate(trainer, setup)
    train(trainer, setup, policy, checkpoint)
    refuse_moved(frozen, frozen_hashes(trainer), run)
    save_policy(trainer, setup)
    result = 0.0
    if run.writes:  # the other processes wait, so that the numbers do not depend on how many there are
        numbers = summarise(setup, trainer, policy)
        run.summary(numbers)
        say(outcome(numbers))
        for warning in numbers["warnings"]:
            say(f"WARNING: {warning}")
        result = objective(numbers, config.evaluation.kl_limit)
    process_group().barrier()
    return result


def record_inputs(setup: "RlhfSetup", trainer: "PhasedTrainer") -> None:
    """What went in, and what may move, into run.json; a resumed run must find the same.

    Raises:
        ValueError: the model or an SAE has changed since the run began.
    """
    from saerl_cli.sae.files import sae_sha256

    loaded, run = setup.loaded, setup.run
    if not run.writes:
        return
    inputs = {
        "model": {"name": loaded.name, "revision": loaded.revision, "sha256": loaded.sha256},
        "sae": {site: {"path": str(path), "sha256": sae_sha256(path)} for site, path in setup.saes.items()},
    }
    before = run.record.get("inputs") if run.checkpoints() else None
    if before not in (None, inputs):
        raise ValueError(f"{run.path} was begun with another model or other SAEs; take a new hydra.run.dir")
    run.update(inputs=inputs, trainable={name: p.numel() for name, p in trainer.trainable()})


def record_insertion(setup: "RlhfSetup", trainer: "PhasedTrainer") -> None:
    """Of sft: the loss that inserting the untouched adapter alone makes, into run.json, before anything is learned."""
    from saerl_cli.rl.outcome import insertion, insertion_warning

    if setup.config.algo.kind is not AlgoKind.sft or not setup.run.writes:
        return
    losses = insertion(setup, trainer)
    setup.run.update(insertion=losses)
    if warning := insertion_warning(losses):
        say(f"WARNING: {warning}")


def calibrate(trainer: "PhasedTrainer", setup: "RlhfSetup") -> None:
    """With reward.normalise=calibrate: the gain and bias that run.json's first look at the untouched model gives.

    Raises:
        ValueError: all completions of the untouched model score the same.
    """
    from saerl_cli.rewards.score import TOTAL

    if setup.config.reward.normalise is not Normalise.calibrate:
        return
    process_group().barrier()  # until the first process has written it
    seen = setup.run.record["reward_spread"][TOTAL]
    if seen["std"] == 0:
        raise ValueError(
            f"reward.normalise=calibrate divides by the spread of the reward, which is {seen['mean']:g} for every"
            " completion of the untouched model; write reward.normalise=none"
        )
    rollouts: Any = trainer
    rollouts.normaliser.calibrate(seen["mean"], seen["std"])


def train(trainer: "PhasedTrainer", setup: "RlhfSetup", policy: "Policy", checkpoint: tuple[int, Path] | None) -> None:
    """All phases, from the checkpoint on when there is one."""
    from saerl_cli.rl import snapshots
    from saerl_cli.rl.outcome import NO_GRADIENT, no_gradient
    from saerl_cli.rl.summary import coefficient_statistics
    from saerl_cli.rl.track import sample_policy

    run, phases, every = setup.run, setup.config.algo.phases, setup.config.evaluation.every
    name = setup.config.algo.kind.value.upper()
    bars = task_bars([name]) if run.writes else contextlib.nullcontext(lambda name, share, note: None)
    with bars as update:
        kept = snapshots.phases_kept(setup.config)

        def on_phase(metrics: dict[str, float]) -> None:
            phase, step = int(metrics["phase"]), trainer.state.global_step
            looks = phase == phases or (every > 0 and phase % every == 0)
            seen = sample_policy(setup, policy, step) if run.writes and looks else {}
            shards.barrier()
            run.log(step, **metrics, **coefficient_statistics(policy.model), **seen)
            if phase in kept:
                snapshots.save(run.path, step, trainer.trainable(), run.writes)
            if phase == 1 and run.writes and metrics["grad_norm"] < NO_GRADIENT:
                say(f"WARNING: {no_gradient(metrics['grad_norm'])}")
            update(name, phase / phases, f"phase {phase}/{phases}, {progress(metrics)}")

        trainer.on_phase = on_phase
        if run.writes:
            snapshots.drop_after(run.path, checkpoint[0] if checkpoint else 0)
        if checkpoint is None:
            trainer.train()
            return
        step, folder = checkpoint
        run.truncate(step)
        if step < trainer.args.max_steps:
            trainer.train(resume_from_checkpoint=str(folder))
        else:
            trainer.load_finished(folder)


def progress(metrics: dict[str, float]) -> str:
    """The numbers of a phase that a person watches."""
    if "reward" in metrics:
        return f"reward {metrics['reward']:.3f}, KL {metrics['kl']:.2f}"
    return f"loss {metrics['loss']:.3f}"


def outcome(numbers: dict[str, Any]) -> str:
    """One line for the person who waited."""
    line = (
        f"reward {numbers['reward_before']:.3f} -> {numbers['reward_after']:.3f} (se {numbers['reward_se']:.3f}),"
        f" KL {numbers['kl']:.2f} nats, held-out loss {numbers['nll_heldout_before']:.3f} ->"
        f" {numbers['nll_heldout_after']:.3f}, {numbers['trainable_parameters']:,} trained parameters"
    )
    if "curse_removed" in numbers:
        line += f", {numbers['curse_removed']:.0%} of the curse words gone"
    return line
