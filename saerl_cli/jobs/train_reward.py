"""`saerl train-reward`: a reward model from preference pairs."""

import contextlib
from typing import TYPE_CHECKING, Any

from saerl_cli.config.groups import Dtype, ModelKind
from saerl_cli.config.train_reward import TrainRewardConfig
from saerl_cli.data.pairs import read_pairs
from saerl_cli.models import context_size, describe, locate
from saerl_cli.rl.reward_model.rows import check_padding
from saerl_cli.run.directory import Run
from saerl_cli.run.files import atomic_folder
from saerl_cli.run.processes import process_group
from saerl_cli.run.progress import say, task_bars

if TYPE_CHECKING:
    from saerl_cli.rl.reward_model.build import RewardModel
    from saerl_cli.rl.reward_model.trainer import RewardTrainer


def check(config: TrainRewardConfig) -> None:
    """Refuse a run that cannot work.

    Raises:
        ValueError: one line saying what is wrong and what to write instead.
    """
    description = describe(config.model)
    if config.model.dtype is not Dtype.float32:
        raise ValueError(
            f"train-reward trains the weights, which model.dtype={config.model.dtype.value} rounds away; write"
            " model.dtype=float32 launch.mixed_precision=bf16"
        )
    context = context_size(description)
    if config.max_length is not None and config.max_length > context:
        raise ValueError(f"max_length={config.max_length} exceeds the model's context of {context} tokens")
    train = read_pairs(config.pairs, config.model, "train")
    refuse_too_few(len(train), config)
    if config.model.kind is ModelKind.local:
        check_padding(locate(config.model))


def refuse_too_few(pairs: int, config: TrainRewardConfig) -> None:
    """Refuse fewer pairs than an optimiser step takes."""
    if pairs < config.batch_size:
        raise ValueError(f"there are {pairs} training pairs, but a step takes batch_size={config.batch_size}; lower it")


def work(config: TrainRewardConfig, run: Run, accelerator: Any) -> float:
    """Train, save RUN/model, measure on held-out pairs; returns the accuracy among decided ones.

    Raises:
        ValueError: what only loading can find out, or (`Diverged`) a number that is not finite.
    """
    from saerl_cli.models import quiet_transformers
    from saerl_cli.rl.reward_model.build import build_model, build_trainer, summarise

    with quiet_transformers():
        reward_model = build_model(config, run, accelerator.device)
        refuse_too_few(len(reward_model.train.pairs), config)
        trainer = build_trainer(reward_model)
        record_inputs(reward_model, trainer)
        train(trainer, reward_model)
        accuracy = 0.0
        if run.writes:
            save_model(reward_model)
            numbers = summarise(reward_model, trainer)
            run.summary(numbers)
            say(outcome(numbers))
            accuracy = numbers["accuracy"]
        process_group().barrier()
    return accuracy


def record_inputs(reward_model: "RewardModel", trainer: "RewardTrainer") -> None:
    """What went in into run.json, and how good the model is before training; a resumed run must find the same model."""
    loaded, run = reward_model.loaded, reward_model.run
    if not run.writes:
        return
    inputs = {"model": {"name": loaded.name, "revision": loaded.revision, "sha256": loaded.sha256}}
    checkpoints = run.checkpoints()
    if checkpoints and run.record.get("inputs") not in (None, inputs):
        raise ValueError(f"{run.path} was begun with another model; take a new hydra.run.dir")
    run.update(inputs=inputs, trainable={name: p.numel() for name, p in trainer.trainable()})
    if not checkpoints:
        run.update(before=reward_model.evaluate())


def train(trainer: "RewardTrainer", reward_model: "RewardModel") -> None:
    """All steps, from the newest checkpoint on when there is one."""
    run, steps = reward_model.run, trainer.args.max_steps
    bars = task_bars(["pairs"]) if run.writes else contextlib.nullcontext(lambda name, share, note: None)
    with bars as update:

        def on_phase(metrics: dict[str, float]) -> None:
            step = trainer.state.global_step
            run.log(step, **metrics)
            update("pairs", step / steps, f"step {step}/{steps}, loss {metrics['loss']:.3f}")

        trainer.on_phase = on_phase
        checkpoint = run.latest_checkpoint()
        run.truncate(checkpoint[0] if checkpoint else -1)
        if checkpoint is None:
            trainer.train()
        elif checkpoint[0] < steps:
            trainer.train(resume_from_checkpoint=str(checkpoint[1]))
        else:
            trainer.load_finished(checkpoint[1])


def save_model(reward_model: "RewardModel") -> None:
    """RUN/model: weights with the score head, and the tokenizer; whole or absent."""
    with atomic_folder(reward_model.run.path / "model", replace=True) as folder:
        reward_model.model.save_pretrained(folder)
        reward_model.loaded.tokenizer.save_pretrained(folder)


def outcome(numbers: dict[str, Any]) -> str:
    """One line for the person who waited."""
    low, high = numbers["accuracy_interval"]
    return (
        f"held-out pairs: {numbers['right']} right, {numbers['wrong']} wrong, {numbers['ties']} ties; accuracy"
        f" {numbers['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}), calibration error {numbers['ece']:.3f};"
        f" preferring the longer reply gets {numbers['longer']['right']} right, {numbers['longer']['wrong']} wrong"
    )
