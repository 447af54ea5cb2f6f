"""`saerl rlhf`: RLHF of a frozen language model by SAE coefficients or another adapter, or of the whole model."""

import contextlib
import copy
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saerl_cli.config.adapter import AdapterKind
from saerl_cli.config.algo import AlgoKind
from saerl_cli.config.reward import Normalise
from saerl_cli.config.rlhf import RlhfConfig
from saerl_cli.rl.check import check
from saerl_cli.run import shards
from saerl_cli.run.directory import Run
from saerl_cli.run.files import atomic_folder
from saerl_cli.run.progress import say, task_bars

if TYPE_CHECKING:
    from torch import Tensor

    from saerl_cli.rl.build import Parts
    from saerl_cli.rl.policy import Policy
    from saerl_cli.rl.trainers.exact import ExactTrainer

__all__ = ["check", "work"]

SHOWN_SAMPLES = 8
"""Completions that samples.jsonl gets at a time, of the same held-out prompts each time."""


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
    from saerl_cli.rl.build import build_parts, build_trainer, policy_of
    from saerl_cli.rl.outcome import objective
    from saerl_cli.rl.proof import frozen_hashes, refuse_moved
    from saerl_cli.rl.summary import summarise

    parts = build_parts(config, run, accelerator.device)
    trainer = build_trainer(parts)
    policy = policy_of(trainer, parts.loaded)
    record_inputs(parts, trainer)
    record_insertion(parts, trainer)
    shards.meet()
    frozen = frozen_hashes(trainer)
    checkpoint = run.latest_checkpoint()
    if checkpoint is None:
        run.truncate(-1)  # what an attempt that left no checkpoint has written
        first_look(parts, policy)
    shards.meet()
    calibrate(trainer, parts)
    train(trainer, parts, policy, checkpoint)
    refuse_moved(frozen, frozen_hashes(trainer), run)
    save_policy(trainer, parts)
    result = 0.0
    if run.writes:  # the other processes wait, so that the numbers do not depend on how many there are
        numbers = summarise(parts, trainer, policy)
        run.summary(numbers)
        say(outcome(numbers))
        for warning in numbers["warnings"]:
            say(f"WARNING: {warning}")
        result = objective(numbers, config.evaluation.kl_limit)
    shards.meet()
    accelerator.wait_for_everyone()
    return result


def record_inputs(parts: "Parts", trainer: "ExactTrainer") -> None:
    """What went in, and what may move, into run.json; a resumed run must find the same.

    Raises:
        ValueError: the model or an SAE has changed since the run began.
    """
    from saerl_cli.sae.files import sae_sha256

    loaded, run = parts.loaded, parts.run
    if not run.writes:
        return
    inputs = {
        "model": {"name": loaded.name, "revision": loaded.revision, "sha256": loaded.sha256},
        "sae": {site: {"path": str(path), "sha256": sae_sha256(path)} for site, path in parts.saes.items()},
    }
    before = run.record.get("inputs") if run.checkpoints() else None
    if before not in (None, inputs):
        raise ValueError(f"{run.path} was begun with another model or other SAEs; take a new hydra.run.dir")
    run.update(inputs=inputs, trainable={name: p.numel() for name, p in trainer.trainable()})


def record_insertion(parts: "Parts", trainer: "ExactTrainer") -> None:
    """Of sft: the loss that inserting the untouched adapter alone makes, into run.json, before anything is learned."""
    from saerl_cli.rl.outcome import insertion, insertion_warning

    if parts.config.algo.kind is not AlgoKind.sft or not parts.run.writes:
        return
    losses = insertion(parts, trainer)
    parts.run.update(insertion=losses)
    if warning := insertion_warning(losses):
        say(f"WARNING: {warning}")


def first_look(parts: "Parts", policy: "Policy") -> None:
    """Samples of the untouched model: step 0 of samples.jsonl, and a warning when the reward tells nothing apart."""
    from saerl_cli.rewards.score import TOTAL, spread
    from saerl_cli.rl.evaluation.measure import cycled, draw
    from saerl_cli.rl.evaluation.passes import base_passes, tell_passes
    from saerl_cli.rl.outcome import unreachable

    if not parts.run.writes:
        return
    prompts = cycled(parts.prompts, min(parts.config.evaluation.samples, 256))
    samples = draw(policy, parts.reward, prompts, parts.sampling("spread"), reference=True)
    spreads = {name: spread(values) for name, values in samples.scores.items()}
    found = base_passes(parts, policy)
    parts.run.update(reward_spread=spreads, **({"base_passes": found} if found else {}))
    tell_passes(found)
    for name, seen in spreads.items():
        if seen["std"] == 0:
            say(
                f"WARNING: {name} is {seen['mean']:g} for all {len(prompts)} completions of the untouched model;"
                " no algorithm can learn from a score that tells nothing apart"
            )
        elif seen["coverage"] < 0.05:
            say(f"WARNING: {name} tells only {seen['coverage']:.1%} of {len(prompts)} completions from the rest")
    target = parts.config.algo.kl_target
    if target is not None and (warning := unreachable(target, samples.scores[TOTAL])):
        say(f"WARNING: {warning}")
    look(parts, policy, 0)


def calibrate(trainer: "ExactTrainer", parts: "Parts") -> None:
    """With reward.normalise=calibrate: the gain and bias that run.json's first look at the untouched model gives.

    Raises:
        ValueError: all completions of the untouched model score the same.
    """
    from saerl_cli.rewards.score import TOTAL

    if parts.config.reward.normalise is not Normalise.calibrate:
        return
    trainer.accelerator.wait_for_everyone()  # until the first process has written it
    seen = parts.run.record["reward_spread"][TOTAL]
    if seen["std"] == 0:
        raise ValueError(
            f"reward.normalise=calibrate divides by the spread of the reward, which is {seen['mean']:g} for every"
            " completion of the untouched model; write reward.normalise=none"
        )
    rollouts: Any = trainer
    rollouts.normaliser.calibrate(seen["mean"], seen["std"])


def train(trainer: "ExactTrainer", parts: "Parts", policy: "Policy", checkpoint: tuple[int, Path] | None) -> None:
    """All phases, from the checkpoint on when there is one."""
    from saerl_cli.rl.outcome import NO_GRADIENT, no_gradient
    from saerl_cli.rl.summary import coefficient_statistics
    from saerl_cli.rl.trainers import snapshots

    run, phases, every = parts.run, parts.config.algo.phases, parts.config.evaluation.every
    name = parts.config.algo.kind.value.upper()
    bars = task_bars([name]) if run.writes else contextlib.nullcontext(lambda name, share, note: None)
    with bars as update:
        kept = snapshots.phases_kept(parts.config)

        def on_phase(metrics: dict[str, float]) -> None:
            phase, step = int(metrics["phase"]), trainer.state.global_step
            looks = phase == phases or (every > 0 and phase % every == 0)
            seen = look(parts, policy, step) if run.writes and looks else {}
            shards.meet()
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


def look(parts: "Parts", policy: "Policy", step: int) -> dict[str, float]:
    """Completions of the same held-out prompts, drawn with the same random numbers every time.

    The first few go into samples.jsonl.

    Returns:
        eval_reward and eval_kl with standard errors, and eval_kl_exact, for metrics.jsonl.
    """
    from saerl_cli.rewards.score import TOTAL
    from saerl_cli.rl.evaluation.measure import cycled, draw, mean_and_error

    prompts = cycled(parts.heldout_prompts, parts.config.evaluation.tracked)
    was_training = policy.model.training
    policy.model.eval()
    samples = draw(policy, parts.reward, prompts, parts.sampling("shown"))
    policy.model.train(was_training)
    rows = zip(samples.prompts, samples.texts, samples.scores[TOTAL], samples.kl, strict=True)
    for prompt, text, reward, kl in islice(rows, SHOWN_SAMPLES):
        parts.run.sample(step, prompt.text, text, reward, kl)
    reward, kl = mean_and_error(samples.scores[TOTAL]), mean_and_error(samples.kl)
    exact = mean_and_error(samples.kl_exact)[0]
    return {
        **{"eval_reward": reward[0], "eval_reward_se": reward[1], "eval_kl": kl[0], "eval_kl_se": kl[1]},
        "eval_kl_exact": exact,
    }


def save_policy(trainer: "ExactTrainer", parts: "Parts") -> None:
    """RUN/adapter (a PEFT folder of what was trained) or RUN/model (weights and tokenizer), whole or absent."""
    from saerl_cli.adapter import save_adapter
    from saerl_cli.rl.trainers.value import without_value_head

    model, run = trainer.accelerator.unwrap_model(trainer.model), parts.run
    if parts.config.adapter.kind is AdapterKind.full:
        state = shards.on_cpu(without_value_head(model.state_dict()).items(), run.writes)
        if run.writes:
            with atomic_folder(run.path / "model", replace=True) as folder:
                save_weights(model, state, folder)
                parts.loaded.tokenizer.save_pretrained(folder)
    elif run.writes:
        save_adapter(model, run.path / "adapter")


def save_weights(model: Any, state: "dict[str, Tensor]", folder: Path) -> None:
    """A model's folder from whole weights; of one that is split, whose own method would ask the other processes."""
    from saerl_cli.models import without_weights

    saved = model
    if shards.is_split(model):
        config = copy.deepcopy(model.config)
        del config.distributed_config
        saved = without_weights(config)
        saved.generation_config = model.generation_config
        saved._weight_conversions = model._weight_conversions  # names in the file are those of the file it came from
    saved.save_pretrained(folder, state_dict=state)


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
