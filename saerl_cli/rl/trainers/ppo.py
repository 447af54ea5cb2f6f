"""Actor-critic PPO as a subclass of TRL's GRPOTrainer.

GRPOTrainer keeps doing data loading, generation, reward calls, the reference pass, the clipped surrogate and the
training loop. Added here: a value head inside the forward pass, the KL as part of the per-token reward, GAE, a clipped
value loss, separate learning rates and gradient clipping, an adaptive KL coefficient, critic warm-up, per-phase
statistics, a stop at the first number that is not finite, and checkpoints that resume to the bit.

One phase is one generation of `generation_batch_size` completions and `num_iterations` epochs of
`steps_per_generation / gradient_accumulation_steps` optimiser steps on them. The seams into TRL and transformers are
held by `tests/test_rl_seams.py`.
"""

from typing import Any

import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

from saerl_cli.rl.trainers import ppo_math
from saerl_cli.rl.trainers.ppo_config import PPOConfig
from saerl_cli.rl.trainers.rollouts import RolloutTrainer
from saerl_cli.rl.trainers.value import add_value_head, own_trunk


class PPOTrainer(RolloutTrainer, GRPOTrainer):
    """PPO with a critic; trains whatever the model or the PEFT method leaves trainable.

    The reference is the adapter switched off, an adapter named `ref` (added for splices that differ from the base model
    at delta = 0), or, without PEFT, a frozen copy loaded from the model's folder.

    Rows of `train_dataset` hold a `prompt` and optionally its `input_ids`, which are then used as they are.

    Args:
        args, kwargs: as for GRPOTrainer; `args` is a `PPOConfig`, a PEFT method comes as `peft_config`.
        on_phase, open_checkpoint: as for `ExactTrainer`.

    Raises:
        ValueError: fewer prompts than a generation batch needs.
        Diverged: a reward, loss, gradient or parameter is not finite (during `train`).
    """

    _tag_names, _name = ["trl", "ppo"], "PPO"

    args: PPOConfig  # narrower than the base classes say

    def __init__(self, *args: Any, **kwargs: Any):
        model, critic = kwargs["model"], kwargs["args"].critic
        trunk = own_trunk(model) if critic == "separate" else None  # before PEFT touches the model
        super().__init__(*args, **kwargs)
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self.value_head = add_value_head(base, detach=critic == "detached", trunk=trunk)
        self.stopped = False  # whether the phase makes no further updates

    # --- a phase begins: rollouts, rewards, advantages ----------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor | Any]:
        args = self.args
        batch = super()._generate_and_score_completions(inputs)
        mask = batch["completion_mask"].float()  # [B, T]
        logp, logp_ref = batch["old_per_token_logps"].float(), batch["ref_per_token_logps"].float()
        values = self.state_values[0] * mask  # the policy is scored first, then the reference
        rewards = ppo_math.token_rewards(self.local_scores(len(mask)), logp, logp_ref, mask, self.kl_coef)
        advantages, returns = ppo_math.gae(rewards, values, mask, args.gamma, args.lam)
        if args.whiten_advantages:
            advantages = ppo_math.whiten(advantages, mask, self.accelerator.reduce)
        # TRL shuffles and splits every tensor of the dictionary whose first dimension is B
        batch.update(advantages=advantages, returns=returns, old_values=values)
        if self.model.training:
            self.rollout_statistics |= {
                "reward_with_kl": self.accelerator.gather(rewards.sum(1)).mean().item(),
                "explained_variance": ppo_math.explained_variance(values, returns, mask, self.accelerator.reduce),
            }
        return batch

    # --- an optimiser step --------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch; nothing where the phase has stopped, so that steps and learning rates count on as always."""
        if self._step % (self.args.steps_per_phase * self.args.gradient_accumulation_steps) == 0:
            self.stopped = False
        if self.stopped:
            self._step += 1
            return torch.zeros((), device=self.accelerator.device)
        return super().training_step(model, inputs, num_items_in_batch)

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        beta, self.beta = self.beta, 0.0  # the KL is in the reward already
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
        mask, values = inputs["completion_mask"].float(), self.state_values[-1]
        errors = ppo_math.clipped_value_loss(
            values, inputs["old_values"], inputs["returns"], self.args.cliprange_value
        )  # [B, T]
        loss = loss + self.args.vf_coef * (errors * mask).sum() / self.tokens_of_a_step(inputs)
        self.refuse_unless_finite("the loss", loss.detach())
        if self.model.training:
            self.describe_update(inputs, errors.detach())
        return loss

    def tokens_of_a_step(self, inputs: dict[str, Tensor]) -> Tensor:
        """What a sum over a micro-batch's tokens is divided by, as TRL's loss_type=dapo does.

        The phase's tokens per micro-batch and process times the micro-batches of an optimiser step: every token of a
        phase weighs the same, however the phase is split over steps, micro-batches and processes.
        """
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return tokens

    def _clip_grad_norm(self, model: Any) -> Tensor:
        """Clip; then leave out the update where the phase has stopped, or the policy's where only the critic learns."""
        if not self.stopped and self.args.stop_epochs_kl is not None:
            self.stopped = self.drift() > self.args.stop_epochs_kl
        if self.stopped:
            self.model.zero_grad()  # AdamW passes over parameters without a gradient
            return torch.zeros(())
        norm = super()._clip_grad_norm(model)
        if self.phase < self.args.critic_warmup:
            for parameter in self.optimizer.param_groups[0]["params"]:
                parameter.grad = None
        return norm

    def drift(self) -> float:
        """KL of the policy that sampled from the one at this optimiser step (k3, nats per token, all processes)."""
        micro_batches = self.update_statistics[-self.current_gradient_accumulation_steps :]
        tokens, kl, *_ = self.accelerator.reduce(torch.stack(micro_batches).sum(0)).tolist()
        return kl / max(tokens, 1.0)
