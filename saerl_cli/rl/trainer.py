"""Actor-critic PPO as a subclass of TRL's GRPOTrainer.

GRPOTrainer keeps doing data loading, generation, reward calls, the reference pass, the clipped surrogate and the
training loop. Added here: a value head inside the forward pass, the KL as part of the per-token reward, GAE, a clipped
value loss, separate learning rates and gradient clipping, an adaptive KL coefficient, critic warm-up, per-phase
statistics, a stop at the first number that is not finite, and checkpoints that resume to the bit.

One phase is one generation of `generation_batch_size` completions and `num_iterations` epochs of
`steps_per_generation / gradient_accumulation_steps` optimiser steps on them. The seams into TRL and transformers are
held by `tests/test_rl_seams.py`.
"""

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

from saerl_cli.rl import ppo_math
from saerl_cli.rl.exact import sample_what_is_scored
from saerl_cli.rl.ppo_config import PPOConfig
from saerl_cli.rl.rollouts import RolloutTrainer
from saerl_cli.rl.value import add_value_head


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
        super().__init__(*args, **kwargs)
        base = self.model
        if kwargs.get("peft_config") is not None:
            config = self.model.peft_config["default"]
            if getattr(config, "splice", None) == "reconstruct":  # delta = 0 is then not the model without adapter
                self.model.add_adapter("ref", config)
                self.model.set_adapter("default")
            base = self.model.get_base_model()
        self.value_head = add_value_head(base, self.args.detach_value_trunk)
        sample_what_is_scored(base, self.eos_token_ids, self._tokenizer.pad_token_id)
        self.kl_coef = self.args.beta
        self.rollout_statistics: dict[str, float] = {}
        self.update_statistics: list[Tensor] = []
        self.state_values: list[Tensor] = []  # [B, T] of every scoring pass since it was last emptied
        self.logps: Tensor | None = None  # [B, T] of the last scoring pass
        self.entropies: Tensor | None = None

    # --- a phase begins: rollouts, rewards, advantages ----------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor | Any]:
        args, self.state_values = self.args, []
        batch = super()._generate_and_score_completions(inputs)
        if "old_per_token_logps" not in batch:  # TRL skips this pass where a phase is one optimiser step
            self.state_values = []
            batch["old_per_token_logps"] = self.score_policy(batch)
        mask = batch["completion_mask"].float()  # [B, T]
        logp, logp_ref = batch["old_per_token_logps"].float(), batch["ref_per_token_logps"].float()
        values = self.state_values[0] * mask  # the policy is scored first, then the reference
        score = self.local_scores(len(mask))  # [B]
        ended = torch.isin(batch["completion_ids"], torch.tensor(self.eos_token_ids, device=mask.device)) & mask.bool()
        if args.missing_eos_penalty is not None:
            score = score - args.missing_eos_penalty * ~ended.any(1)
        rewards = ppo_math.token_rewards(score, logp, logp_ref, mask, self.kl_coef)
        advantages, returns = ppo_math.gae(rewards, values, mask, args.gamma, args.lam)
        if args.whiten_advantages:
            advantages = ppo_math.whiten(advantages, mask, self.accelerator.reduce)
        # TRL shuffles and splits every tensor of the dictionary whose first dimension is B
        batch.update(advantages=advantages, returns=returns, old_values=values)
        if self.model.training:
            self.describe_rollouts(logp, logp_ref, mask, ended.any(1), rewards, returns, values)
        return batch

    @torch.no_grad()
    def score_policy(self, batch: dict[str, Any]) -> Tensor:
        """Log-probabilities [B, T] of the completions under the current policy."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        width, size = batch["completion_ids"].shape[1], self.args.per_device_train_batch_size
        return self._get_per_token_logps_and_entropies(self.model, ids, mask, width, batch_size=size)[0]

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        values: list[Tensor] = []

        def recording(**inputs: Any) -> Any:  # the base class only ever calls `model(...)`
            if not inputs["attention_mask"][:, 0].all():  # left padding matters to learned positions
                inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            out = model(**inputs)
            if out.get("state_values") is not None:  # the frozen copy of adapter=full has none
                values.append(out.state_values)
            return out

        self.logps, self.entropies, auxiliary = super()._get_per_token_logps_and_entropies(
            recording, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        if values:  # the value before a token belongs to the position before it
            self.state_values.append(torch.cat(values)[:, :-1][:, -logits_to_keep:])
        return self.logps, self.entropies, auxiliary

    # --- an optimiser step --------------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        self.state_values, beta = [], self.beta
        self.beta = 0.0  # the KL is in the reward already
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
            self.describe_update(inputs, mask, errors.detach())
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

    # --- statistics ---------------------------------------------------------------------------------------------------

    def describe_rollouts(
        self,
        logp: Tensor,
        logp_ref: Tensor,
        mask: Tensor,
        ended: Tensor,
        rewards: Tensor,
        returns: Tensor,
        values: Tensor,
    ) -> None:
        """Statistics of a phase's completions over all processes; every argument is [B, T], `ended` is [B]."""
        lengths = mask.sum(1)
        columns = {
            "reward_with_kl": rewards.sum(1),
            "kl": ppo_math.k1(logp, logp_ref, mask),
            "kl_k3": ppo_math.k3(logp, logp_ref, mask),
            "length": lengths,
            "ended": ended.float(),
        }
        rows = self.accelerator.gather(torch.stack(list(columns.values()), dim=1))  # [processes * B, 5]
        total = self.raw_rewards @ self.reward_weights.to(self.raw_rewards)
        parts = zip(self.reward_func_names, self.raw_rewards.mean(0).tolist(), strict=True)
        self.rollout_statistics = {
            "reward": total.mean().item(),
            "reward_std": total.std().item(),
            **self.normaliser.metrics,
            **{f"reward/{name}": value for name, value in parts},
            **dict(zip(columns, rows.mean(0).tolist(), strict=True)),
            "tokens": rows[:, list(columns).index("length")].sum().item(),
            "episodes": len(rows),
            "explained_variance": ppo_math.explained_variance(values, returns, mask, self.accelerator.reduce),
        }

    @torch.no_grad()
    def describe_update(self, inputs: dict[str, Tensor], mask: Tensor, value_errors: Tensor) -> None:
        """Keep sums over a micro-batch's tokens; `phase_metrics` turns them into means."""
        assert self.logps is not None and self.entropies is not None
        log_ratio = (self.logps.detach() - inputs["old_per_token_logps"]) * mask
        ratio, advantages = log_ratio.exp(), inputs["advantages"]
        low, high = 1 - self.epsilon_low, 1 + self.epsilon_high
        clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
        sums = (
            mask.sum(),
            ((ratio - 1 - log_ratio) * mask).sum(),  # k3 of the new policy from the old
            (clipped * mask).sum(),
            ((ratio - 1).abs() * mask).sum(),
            (self.entropies.detach() * mask).sum(),
            value_errors.mul(mask).sum(),
        )
        self.update_statistics.append(torch.stack([s.float() for s in sums]))

    def phase_metrics(self, learning_rate: float) -> dict[str, float]:
        """The statistics of the phase that just ended, averaged over its tokens and all processes."""
        tokens, *sums = self.accelerator.reduce(torch.stack(self.update_statistics).sum(0)).tolist()
        names = ("approx_kl", "clip_fraction", "ratio_deviation", "entropy", "value_loss")
        norms = np.array(self.grad_norms).mean(0).tolist()
        seconds = time.perf_counter() - self.phase_start
        self.seconds += seconds
        rollouts = self.rollout_statistics
        metrics = rollouts | dict(zip(names, (s / max(tokens, 1) for s in sums), strict=True))
        return metrics | {
            "phase": self.phase,
            "grad_norm": norms[0],
            "grad_norm_value": norms[1],
            "lr": learning_rate,
            "kl_coef": self.kl_coef,
            "seconds": seconds,
            "tokens_per_second": rollouts["tokens"] / seconds,
            "samples_per_second": rollouts["episodes"] / seconds,
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """End of a phase: gather its statistics, adapt the KL coefficient, call `on_phase`."""
        ended_a_phase = self.model.training and "grad_norm" in logs
        if ended_a_phase:
            metrics = self.phase_metrics(logs["learning_rate"])
            self.refuse_unless_finite("a trained parameter", *(p.detach() for _, p in self.trainable()), ended=True)
            if self.args.kl_target is not None:
                self.kl_coef = ppo_math.adaptive_kl(
                    self.kl_coef, metrics["kl"], self.args.kl_target, int(metrics["episodes"]), self.args.kl_horizon
                )
            self.update_statistics, self.grad_norms = [], []
            self._metrics["train"].clear()  # TRL's own, of which ours are a superset
            logs = {**logs, **metrics}
            self.on_phase(metrics)
        super().log(logs, start_time)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def adaptive_state(self) -> dict[str, Any]:
        """And the KL coefficient."""
        return super().adaptive_state() | {"kl_coef": self.kl_coef}

    def load_adaptive_state(self, state: dict[str, Any]) -> None:
        """Take over what `adaptive_state` gave."""
        super().load_adaptive_state(state)
        self.kl_coef = state["kl_coef"]
