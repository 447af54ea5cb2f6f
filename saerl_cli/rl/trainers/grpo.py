"""Critic-free algorithms: TRL's own GRPO and RLOO, made exact and given the statistics that PPO has."""

from typing import Any

from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer as TRLGRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer as TRLRLOOTrainer

from saerl_cli.rl.trainers.rollouts import RolloutTrainer


class GroupTrainer(RolloutTrainer):
    """Mixed in before a trainer of TRL whose baseline is the group of a prompt's completions."""

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor | Any]:
        self.beta = self.kl_coef  # of the reward (RLOO); that of the loss (GRPO) stays for the phase too
        return super()._generate_and_score_completions(inputs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        self.refuse_unless_finite("the loss", loss.detach())
        if self.model.training:
            self.describe_update(inputs)
        return loss


class GRPOTrainer(GroupTrainer, TRLGRPOTrainer):
    """Group relative policy optimisation (Shao et al. 2024): advantages of a group, k3 in the loss."""


class RLOOTrainer(GroupTrainer, TRLRLOOTrainer):
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024): k1 in the reward, one ratio a completion."""

    sequence_ratio = True
