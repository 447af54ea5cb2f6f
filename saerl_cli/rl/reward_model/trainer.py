"""TRL's RewardTrainer with checkpoints that resume to the bit and an order of pairs that depends on seed and epoch."""

from dataclasses import dataclass
from typing import Any

from trl.trainer.reward_config import RewardConfig as TrlRewardConfig
from trl.trainer.reward_trainer import RewardTrainer as TrlRewardTrainer

from saerl_cli.rl.training.supervised import SupervisedTrainer


@dataclass
class RewardTrainerConfig(TrlRewardConfig):
    """TRL's settings, and what `PhasedTrainer` asks of any: a phase is an optimiser step."""

    steps_per_phase: int = 1


class RewardTrainer(SupervisedTrainer, TrlRewardTrainer):
    """A reward model on rows of `chosen_ids` and `rejected_ids`; calls `on_phase` after every optimiser step.

    Raises:
        ValueError: fewer pairs than an optimiser step takes.
        Diverged: a loss, gradient or parameter is not finite (during `train`).
    """

    _tag_names, _name = ["trl", "reward-trainer"], "Reward"

    def adaptive_state(self) -> dict[str, Any]:
        """And the tokens seen."""
        return super().adaptive_state() | {"tokens": self._total_train_tokens}

    def load_adaptive_state(self, state: dict[str, Any]) -> None:
        """Take over what `adaptive_state` gave."""
        super().load_adaptive_state(state)
        self._total_train_tokens = state["tokens"]
