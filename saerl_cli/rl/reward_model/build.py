"""From settings to a reward model in training: the model with a score head, its pairs, its trainer."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from saerl_cli.config.groups import Precision
from saerl_cli.config.train_reward import TrainRewardConfig
from saerl_cli.data.pairs import read_pairs
from saerl_cli.models import Loaded, load_model
from saerl_cli.rewards.calibration import preference_numbers
from saerl_cli.rewards.classifier import score_rows
from saerl_cli.rl.reward_model.rows import Rows, encode_pairs, end_id, pad_is_end
from saerl_cli.rl.reward_model.trainer import RewardTrainer, RewardTrainerConfig
from saerl_cli.run.directory import Run

EVALUATION_PAIRS = 16
"""Pairs scored at once."""


@dataclass
class RewardModel:
    """A reward model and the pairs it is trained and judged on."""

    config: TrainRewardConfig
    run: Run
    loaded: Loaded
    model: Any
    train: Rows
    heldout: Rows
    skipped: Counter[str]
    """Pairs of the file that were left out, by reason."""

    def evaluate(self) -> dict[str, Any]:
        """Right, wrong, ties and calibration on the held-out pairs."""
        was_training = self.model.training
        self.model.eval()
        pad, rows = self.loaded.tokenizer.pad_token_id, self.heldout
        chosen, rejected = (
            score_rows(self.model, side, pad, EVALUATION_PAIRS) for side in (rows.chosen, rows.rejected)
        )
        self.model.train(was_training)
        return preference_numbers(chosen, rejected)


def build_model(config: TrainRewardConfig, run: Run, device: Any) -> RewardModel:
    """Load the model with a new score head, read and encode the pairs."""
    loaded = load_model(config.model)
    if loaded.tokenizer.pad_token_id == end_id(loaded):
        raise ValueError(pad_is_end(loaded.folder))
    skipped: Counter[str] = Counter()
    train = read_pairs(config.pairs, config.model, "train", skipped)
    encoding = (loaded.tokenizer, end_id(loaded), config.max_length or loaded.context_size, config.too_long)
    rows = encode_pairs(train, *encoding)
    heldout = encode_pairs(read_pairs(config.pairs, config.model, "heldout"), *encoding)
    if not heldout.pairs:
        raise ValueError(f"no held-out pair fits into max_length={encoding[2]} tokens; raise it or pairs.heldout")
    return RewardModel(config, run, loaded, score_model(loaded, config.seed).to(device), rows, heldout, skipped)


def score_model(loaded: Loaded, seed: int) -> Any:
    """The model's trunk with a new score head of one label, in float32.

    The head is drawn with a standard deviation of 1 / sqrt(width + 1) from the seed (arXiv 2403.17031, as in OpenAI's
    lm-human-preferences).
    """
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


def build_trainer(reward_model: RewardModel) -> RewardTrainer:
    """The trainer of these reward_model."""
    config, rows = reward_model.config, reward_model.train
    on_cpu = config.launch.cpu or not torch.cuda.is_available()
    share = config.batch_size // config.launch.num_processes
    micro_batch = config.micro_batch or share
    settings = RewardTrainerConfig(
        output_dir=str(reward_model.run.path / "checkpoints"),
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
        model=reward_model.model,
        args=settings,
        train_dataset=Dataset.from_dict({"chosen_ids": rows.chosen, "rejected_ids": rows.rejected}),
        processing_class=reward_model.loaded.tokenizer,
        open_checkpoint=reward_model.run.save_checkpoint,
    )


def summarise(reward_model: RewardModel, trainer: RewardTrainer) -> dict[str, Any]:
    """The numbers of summary.json; `longer` is what preferring the longer reply would get on the same pairs."""
    rows = reward_model.heldout
    longer = preference_numbers([float(len(c)) for c in rows.chosen], [float(len(r)) for r in rows.rejected])
    before = reward_model.run.record.get("before", {})
    return {
        **reward_model.evaluate(),
        "accuracy_before": before.get("accuracy"),
        "longer": {name: longer[name] for name in ("right", "wrong", "ties")},
        "pairs_trained": len(reward_model.train.pairs),
        "prompts_cut": reward_model.train.cut + rows.cut,
        "too_long": reward_model.train.left_out + rows.left_out,
        "left_out": dict(reward_model.skipped),
        "steps": trainer.args.max_steps,
        "tokens": trainer._total_train_tokens,
        "parameters": sum(p.numel() for _, p in trainer.trainable()),
        "seconds": trainer.seconds,
    }
