"""`saerl train-reward`: a reward model from preference pairs."""

import contextlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saerl_cli.config.groups import Dtype, ModelKind, Precision
from saerl_cli.config.train_reward import TooLong, TrainRewardConfig
from saerl_cli.data.pairs import Pair, read_pairs, read_pairs_with_counts
from saerl_cli.models import context_size, describe, locate
from saerl_cli.run.directory import Run
from saerl_cli.run.files import atomic_folder, read_json
from saerl_cli.run.progress import say, task_bars

if TYPE_CHECKING:
    from saerl_cli.models import Loaded
    from saerl_cli.rl.reward_model.trainer import RewardTrainer

EVALUATION_PAIRS = 16
"""Pairs scored at once."""


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


def check_padding(folder: Path) -> None:
    """Refuse a tokenizer whose settings say that it pads with its end token."""
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    pad, end = (as_text(settings.get(name)) for name in ("pad_token", "eos_token"))
    if pad is not None and pad == end:
        raise ValueError(pad_is_end(folder))


def pad_is_end(folder: Path) -> str:
    """The message about a tokenizer with which the score would be read at the wrong place."""
    return (
        f"the tokenizer in {folder} pads with its end token, so a score would be read before the end; give it another"
        " pad_token in tokenizer_config.json"
    )


def as_text(token: Any) -> str | None:
    """A token of tokenizer_config.json, which may be an object."""
    return token.get("content") if isinstance(token, dict) else token


def refuse_too_few(pairs: int, config: TrainRewardConfig) -> None:
    """Refuse fewer pairs than an optimiser step takes."""
    if pairs < config.batch_size:
        raise ValueError(f"there are {pairs} training pairs, but a step takes batch_size={config.batch_size}; lower it")


# --- token ids -------------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """Pairs as token ids: prompt, reply and end token."""

    chosen: list[list[int]] = field(default_factory=list)
    rejected: list[list[int]] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    cut: int = 0
    """Pairs whose prompt was cut."""
    left_out: int = 0
    """Pairs that did not fit."""


def encode_pairs(pairs: list[Pair], tokenizer: Any, end: int, longest: int, too_long: TooLong) -> Rows:
    """Pairs as token ids, of at most `longest` tokens a side; the end token is kept, the prompt cut from the left.

    A reply is encoded by itself, as a policy writes it behind the prompt's tokens.
    """
    rows = Rows()
    for pair in pairs:
        prompt = tokenizer(pair.prompt)["input_ids"]
        replies = [[*tokenizer(t, add_special_tokens=False)["input_ids"], end] for t in (pair.chosen, pair.rejected)]
        room = longest - max(map(len, replies))
        if len(prompt) > room:
            if too_long is TooLong.drop or room < 0:
                rows.left_out += 1
                continue
            rows.cut += 1
        kept = prompt[max(0, len(prompt) - room) :]  # of the same length for both sides
        rows.chosen.append(kept + replies[0])
        rows.rejected.append(kept + replies[1])
        rows.pairs.append(pair)
    return rows


def end_id(loaded: "Loaded") -> int:
    """The token that ends a text: as the model's generation config says, else the tokenizer's."""
    file = loaded.folder / "generation_config.json"
    given = read_json(file).get("eos_token_id") if file.is_file() else None
    own = loaded.tokenizer.eos_token_id
    ids = given if isinstance(given, list) else [own if given is None else given]
    return own if own in ids else ids[0]


# --- work ------------------------------------------------------------------------------------------------------------


@dataclass
class Pieces:
    """What a run is made of."""

    config: TrainRewardConfig
    run: Run
    loaded: "Loaded"
    model: Any
    train: Rows
    heldout: Rows
    skipped: Counter[str]
    """Pairs of the file that were left out, by reason."""

    def evaluate(self) -> dict[str, Any]:
        """Right, wrong, ties and calibration on the held-out pairs."""
        from saerl_cli.rewards.calibration import preference_numbers
        from saerl_cli.rewards.classifier import score_rows

        was_training = self.model.training
        self.model.eval()
        pad, rows = self.loaded.tokenizer.pad_token_id, self.heldout
        chosen, rejected = (
            score_rows(self.model, side, pad, EVALUATION_PAIRS) for side in (rows.chosen, rows.rejected)
        )
        self.model.train(was_training)
        return preference_numbers(chosen, rejected)


def work(config: TrainRewardConfig, run: Run, accelerator: Any) -> float:
    """Train, save RUN/model, measure on held-out pairs; returns the accuracy among decided ones.

    Raises:
        ValueError: what only loading can find out, or (`Diverged`) a number that is not finite.
    """
    from saerl_cli.models import quiet_transformers

    with quiet_transformers():
        pieces = build(config, run, accelerator.device)
        trainer = build_trainer(pieces)
        record_inputs(pieces, trainer)
        train(trainer, pieces)
        accuracy = 0.0
        if run.writes:
            save_model(pieces)
            numbers = summarise(pieces, trainer)
            run.summary(numbers)
            say(outcome(numbers))
            accuracy = numbers["accuracy"]
        accelerator.wait_for_everyone()
    return accuracy


def build(config: TrainRewardConfig, run: Run, device: Any) -> Pieces:
    """Load the model with a new score head, read and encode the pairs."""
    from saerl_cli.models import load_model

    loaded = load_model(config.model)
    if loaded.tokenizer.pad_token_id == end_id(loaded):
        raise ValueError(pad_is_end(loaded.folder))
    train, skipped = read_pairs_with_counts(config.pairs, config.model, "train")
    encoding = (loaded.tokenizer, end_id(loaded), config.max_length or loaded.context_size, config.too_long)
    rows = encode_pairs(train, *encoding)
    refuse_too_few(len(rows.pairs), config)
    heldout = encode_pairs(read_pairs(config.pairs, config.model, "heldout"), *encoding)
    if not heldout.pairs:
        raise ValueError(f"no held-out pair fits into max_length={encoding[2]} tokens; raise it or pairs.heldout")
    return Pieces(config, run, loaded, score_model(loaded, config.seed).to(device), rows, heldout, skipped)


def score_model(loaded: "Loaded", seed: int) -> Any:
    """The model's trunk with a new score head of one label, in float32.

    The head is drawn with a standard deviation of 1 / sqrt(width + 1) from the seed (arXiv 2403.17031, as in OpenAI's
    lm-human-preferences).
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(
        loaded.folder, num_labels=1, dtype=torch.float32, local_files_only=True
    )
    if not hasattr(model, "score"):
        raise ValueError(
            f"{type(model).__name__} reads its score elsewhere than at the end of the text; take another model"
        )
    weight = model.score.weight
    draws = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    weight.data.copy_(draws / (weight.shape[1] + 1) ** 0.5)
    model.config.get_text_config().pad_token_id = loaded.tokenizer.pad_token_id
    return model


def build_trainer(pieces: Pieces) -> "RewardTrainer":
    """The trainer of these pieces."""
    import torch
    from datasets import Dataset

    from saerl_cli.rl.reward_model.trainer import RewardTrainer, RewardTrainerConfig

    config, rows = pieces.config, pieces.train
    on_cpu = config.launch.cpu or not torch.cuda.is_available()
    share = config.batch_size // config.launch.num_processes
    micro_batch = config.micro_batch or share
    settings = RewardTrainerConfig(
        output_dir=str(pieces.run.path / "checkpoints"),
        max_steps=config.epochs * (len(rows.pairs) // config.batch_size),
        save_strategy="steps",
        save_steps=config.checkpoint_every,
        logging_steps=1,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=share // micro_batch,
        learning_rate=config.lr,
        lr_scheduler_type="linear",
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        center_rewards_coefficient=config.center or None,
        max_length=None,  # done already
        activation_checkpointing=False,
        logging_nan_inf_filter=False,
        report_to="none",
        seed=config.seed,
        bf16=config.launch.mixed_precision is Precision.bf16,
        fp16=config.launch.mixed_precision is Precision.fp16,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and config.launch.num_processes > 1 else None,
        dataloader_pin_memory=not on_cpu,
        dataloader_drop_last=True,
        disable_tqdm=True,
    )
    return RewardTrainer(
        model=pieces.model,
        args=settings,
        train_dataset=Dataset.from_dict({"chosen_ids": rows.chosen, "rejected_ids": rows.rejected}),
        processing_class=pieces.loaded.tokenizer,
        open_checkpoint=pieces.run.save_checkpoint,
    )


def record_inputs(pieces: Pieces, trainer: "RewardTrainer") -> None:
    """What went in into run.json, and how good the model is before training; a resumed run must find the same model."""
    loaded, run = pieces.loaded, pieces.run
    if not run.writes:
        return
    inputs = {"model": {"name": loaded.name, "revision": loaded.revision, "sha256": loaded.sha256}}
    checkpoints = run.checkpoints()
    if checkpoints and run.record.get("inputs") not in (None, inputs):
        raise ValueError(f"{run.path} was begun with another model; take a new hydra.run.dir")
    run.update(inputs=inputs, trainable={name: p.numel() for name, p in trainer.trainable()})
    if not checkpoints:
        run.update(before=pieces.evaluate())


def train(trainer: "RewardTrainer", pieces: Pieces) -> None:
    """All steps, from the newest checkpoint on when there is one."""
    run, steps = pieces.run, trainer.args.max_steps
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


def save_model(pieces: Pieces) -> None:
    """RUN/model: weights with the score head, and the tokenizer; whole or absent."""
    with atomic_folder(pieces.run.path / "model", replace=True) as folder:
        pieces.model.save_pretrained(folder)
        pieces.loaded.tokenizer.save_pretrained(folder)


def summarise(pieces: Pieces, trainer: "RewardTrainer") -> dict[str, Any]:
    """The numbers of summary.json; `longer` is what preferring the longer reply would get on the same pairs."""
    from saerl_cli.rewards.calibration import preference_numbers

    rows = pieces.heldout
    longer = preference_numbers([float(len(c)) for c in rows.chosen], [float(len(r)) for r in rows.rejected])
    before = pieces.run.record.get("before", {})
    return {
        **pieces.evaluate(),
        "accuracy_before": before.get("accuracy"),
        "longer": {name: longer[name] for name in ("right", "wrong", "ties")},
        "pairs_trained": len(pieces.train.pairs),
        "prompts_cut": pieces.train.cut + rows.cut,
        "too_long": pieces.train.left_out + rows.left_out,
        "left_out": dict(pieces.skipped),
        "steps": trainer.args.max_steps,
        "tokens": trainer._total_train_tokens,
        "parameters": sum(p.numel() for _, p in trainer.trainable()),
        "seconds": trainer.seconds,
    }


def outcome(numbers: dict[str, Any]) -> str:
    """One line for the person who waited."""
    low, high = numbers["accuracy_interval"]
    return (
        f"held-out pairs: {numbers['right']} right, {numbers['wrong']} wrong, {numbers['ties']} ties; accuracy"
        f" {numbers['accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%}), calibration error {numbers['ece']:.3f};"
        f" preferring the longer reply gets {numbers['longer']['right']} right, {numbers['longer']['wrong']} wrong"
    )
