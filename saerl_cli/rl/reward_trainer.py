"""TRL's RewardTrainer with checkpoints that resume to the bit and an order of pairs that depends on seed and epoch."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Sampler
from trl.trainer.reward_config import RewardConfig as TrlRewardConfig
from trl.trainer.reward_trainer import RewardTrainer as TrlRewardTrainer

from saerl_cli.rl.exact import ExactTrainer, derived_seed


@dataclass
class RewardTrainerConfig(TrlRewardConfig):
    """TRL's settings, and what `ExactTrainer` asks of any: a phase is an optimiser step, there is no critic."""

    steps_per_phase: int = 1
    critic_warmup: int = 0
    value_learning_rate: float = 0.0


class EpochOrder(Sampler):
    """All indices in an order that is a function of seed and epoch, so that a resumed run sees the same pairs."""

    def __init__(self, size: int, seed: int, trainer: Any):
        self.size, self.seed, self.trainer = size, seed, trainer

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        epoch = int(self.trainer.state.epoch or 0)
        generator = torch.Generator().manual_seed(derived_seed(self.seed, epoch))
        return iter(torch.randperm(self.size, generator=generator).tolist())


class RewardTrainer(ExactTrainer, TrlRewardTrainer):
    """A reward model on rows of `chosen_ids` and `rejected_ids`; calls `on_phase` after every optimiser step.

    Raises:
        Diverged: a loss, gradient or parameter is not finite (during `train`).
    """

    _tag_names, _name = ["trl", "reward-trainer"], "Reward"

    train_dataset: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        return EpochOrder(len(train_dataset or self.train_dataset), self.args.seed, self)

    def geometry(self) -> dict[str, Any]:
        """And of how many pairs a step is made."""
        args = self.args
        return {
            "processes": self.accelerator.num_processes,
            "batch": args.per_device_train_batch_size * args.gradient_accumulation_steps,
            "pairs": len(self.train_dataset),
            "max_steps": args.max_steps,
            "seed": args.seed,
        }

    def adaptive_state(self) -> dict[str, Any]:
        """And the tokens seen."""
        return super().adaptive_state() | {"tokens": self._total_train_tokens}

    def load_adaptive_state(self, state: dict[str, Any]) -> None:
        """Take over what `adaptive_state` gave."""
        super().load_adaptive_state(state)
        self._total_train_tokens = state["tokens"]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's; a loss that is not finite stops the run."""
        loss = super().compute_loss(*args, **kwargs)
        self.refuse_unless_finite("the loss", (loss[0] if isinstance(loss, tuple) else loss).detach())
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, with the time it takes."""
        self.step_start = time.perf_counter()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """End of an optimiser step: its statistics go to `on_phase`."""
        is_step = self.model.training and "grad_norm" in logs
        super().log(logs, start_time)  # which adds the averages of accuracy, margin and scores to `logs`
        if is_step:
            self.refuse_unless_finite("a trained parameter", *(p.detach() for _, p in self.trainable()), ended=True)
            now = time.perf_counter()
            seconds, self.step_start = now - self.step_start, now
            self.seconds += seconds
            self.grad_norms = []
            kept = ("loss", "accuracy", "margin", "mean_reward", "grad_norm", "learning_rate", "epoch", "num_tokens")
            self.on_phase({name: float(logs[name]) for name in kept} | {"seconds": seconds})
