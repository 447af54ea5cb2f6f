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
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import GenerationConfig, PrinterCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from saerl_cli.rl import checkpoint, ppo_math
from saerl_cli.rl.ppo_config import PPOConfig
from saerl_cli.rl.value import add_value_head, is_value_parameter
from saerl_cli.run.files import atomic_folder

# TRL 1.16 reads a name that transformers 5.23 renames
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


class Diverged(ValueError):
    """A loss, reward or parameter that is not finite; the message names the phase."""


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order that is a function of seed and epoch, so that a resumed run sees the same prompts.

    The stock one seeds its generator once, and a resumed run would replay the order of epoch 0.
    """

    def __init__(self, stock: RepeatSampler, epoch: Callable[[], int]):
        self.__dict__.update(stock.__dict__)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(derived_seed(self.seed or 0, self.epoch()))
        yield from super().__iter__()


def derived_seed(*numbers: int) -> int:
    """A 32-bit seed that depends on every one of the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class PPOTrainer(GRPOTrainer):
    """PPO with a critic; trains whatever the model or the PEFT method leaves trainable.

    The reference is the adapter switched off, an adapter named `ref` (added for splices that differ from the base model
    at delta = 0), or, without PEFT, a frozen copy loaded from the model's folder.

    Rows of `train_dataset` hold a `prompt` and optionally its `input_ids`, which are then used as they are.

    Args:
        args, kwargs: as for GRPOTrainer; `args` is a `PPOConfig`, a PEFT method comes as `peft_config`.
        on_phase: called after every phase with its statistics, before a checkpoint is written.
        open_checkpoint: gives the folder to fill for an optimiser step and makes it appear whole or not at all; by
            default `output_dir/checkpoint-N`.

    Raises:
        ValueError: fewer prompts than a generation batch needs.
        Diverged: a reward, loss, gradient or parameter is not finite (during `train`).
    """

    _tag_names, _name = ["trl", "ppo"], "PPO"

    args: PPOConfig  # narrower than the base classes say, or wrapped by Accelerate
    model: Any
    train_dataset: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        *args: Any,
        on_phase: Callable[[dict[str, float]], None] | None = None,
        open_checkpoint: Callable[[int], AbstractContextManager[Path]] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.on_phase = on_phase or (lambda metrics: None)
        self.open_checkpoint = open_checkpoint or (
            lambda step: atomic_folder(Path(self.args.output_dir or ".") / f"checkpoint-{step}", replace=True)
        )
        needed = (self.args.generation_batch_size or 0) // self.args.num_generations
        if len(self.train_dataset) < needed:  # TRL would end the run at step 0 without a word
            raise ValueError(f"there are {len(self.train_dataset)} prompts, but one phase takes {needed}")
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
        self.seconds = 0.0  # spent in phases, over all sittings
        self.phase_start = time.perf_counter()
        self.rollout_statistics: dict[str, float] = {}
        self.update_statistics: list[Tensor] = []
        self.grad_norms: list[tuple[float, float]] = []
        self.prompt_ids: dict[str, list[int]] = {}
        self.raw_rewards = torch.zeros(0)  # of the last generation: [processes * B, parts]
        self.state_values: list[Tensor] = []  # [B, T] of every scoring pass since it was last emptied
        self.logps: Tensor | None = None  # [B, T] of the last scoring pass
        self.entropies: Tensor | None = None

    # --- where the run stands ---------------------------------------------------------------------------------------

    @property
    def phase(self) -> int:
        """Phases completed."""
        return self.state.global_step // self.args.steps_per_phase

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that training moves: the policy's and the value head's."""
        model = self.accelerator.unwrap_model(self.model)
        return ((name, p) for name, p in model.named_parameters() if p.requires_grad)

    def refuse_unless_finite(self, what: str, *tensors: Tensor, ended: bool = False) -> None:
        """Stop the run when a number is NaN or infinite, naming the phase, which may just have `ended`."""
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise Diverged(
                f"phase {self.phase + (not ended)} (optimiser step {self.state.global_step}): {what} is not finite;"
                " lower the learning rate or look at the reward, the last checkpoint is kept"
            )

    # --- data -------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        stock: Any = super()._get_train_sampler(dataset)
        return EpochSampler(stock, lambda: int(self.state.epoch or 0))

    def _tokenize_prompts(self, prompts: list) -> tuple:
        if self.prompt_ids:
            return [self.prompt_ids[prompt] for prompt in prompts], None, {}
        return super()._tokenize_prompts(prompts)

    # --- a phase begins: rollouts, rewards, advantages ----------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor | Any]:
        args, training = self.args, self.model.training
        if training:  # everything random in a phase follows from this
            self.phase_start = time.perf_counter()
            set_seed(derived_seed(args.seed, self.phase, self.accelerator.process_index))
        self.prompt_ids = {row["prompt"]: row["input_ids"] for row in inputs if "input_ids" in row}
        self.state_values = []
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
        if training:
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

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        try:
            self.raw_rewards = super()._calculate_rewards(*args, **kwargs)  # gathered: [processes * B, parts]
        except ValueError as error:
            raise ValueError(f"phase {self.phase + 1}: {error}") from error
        self.refuse_unless_finite("a reward", self.raw_rewards)
        return self.raw_rewards

    def local_scores(self, size: int) -> Tensor:
        """The weighted sum of the reward's parts for this process's completions; [B]."""
        start = self.accelerator.process_index * size
        return (self.raw_rewards @ self.reward_weights.to(self.raw_rewards))[start : start + size]

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

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with one group for the policy and one for the value head."""
        if self.optimizer is None:
            named = [(n, p) for n, p in (model or self.model).named_parameters() if p.requires_grad]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            policy = [p for n, p in named if not is_value_parameter(n)]
            head = [p for n, p in named if is_value_parameter(n)]
            groups = [
                {"params": policy, "weight_decay": self.args.weight_decay},
                {"params": head, "lr": self.args.value_learning_rate, "weight_decay": 0.0},
            ]
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def _clip_grad_norm(self, model: Any) -> Tensor:
        """Clip each group by its own norm: a joint one would let the critic's gradient shrink the policy's step."""
        self.accelerator.unscale_gradients()
        policy, head = (group["params"] for group in self.optimizer.param_groups)
        norms = [nn.utils.clip_grad_norm_(group, self.args.max_grad_norm) for group in (policy, head)]
        if self.accelerator.scaler is None:  # fp16 scaling skips steps with infinite gradients by itself
            self.refuse_unless_finite("a gradient", *norms)
        self.grad_norms.append((norms[0].item(), norms[1].item()))
        if self.phase < self.args.critic_warmup:
            for parameter in policy:
                parameter.grad = None  # AdamW passes over it
        return norms[0]

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

    def geometry(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same run."""
        args = self.args
        return {
            "processes": self.accelerator.num_processes,
            "rollouts": args.generation_batch_size,
            "steps_per_phase": args.steps_per_phase,
            "max_steps": args.max_steps,
            "seed": args.seed,
        }

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:
            state = {
                "kl_coef": self.kl_coef,
                "seconds": self.seconds,
                "geometry": self.geometry(),
                "scheduler": self.lr_scheduler.state_dict(),
                "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
            }
            with self.open_checkpoint(self.state.global_step) as folder:
                checkpoint.save(folder, self.trainable(), self.optimizer, state)
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        saved, now = checkpoint.read_state(folder)["geometry"], self.geometry()
        for name, value in now.items():
            if saved[name] != value:
                raise ValueError(f"the checkpoint {folder} was made with {name}={saved[name]}, this run has {value}")
        checkpoint.load_weights(folder, self.trainable())

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is None:
            return
        folder = Path(checkpoint_folder)
        state = checkpoint.read_state(folder)
        checkpoint.load_optimizer(folder, self.optimizer)
        self.lr_scheduler.load_state_dict(state["scheduler"])
        if state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.kl_coef, self.seconds = state["kl_coef"], state["seconds"]

    def load_finished(self, folder: Path) -> None:
        """Take over the checkpoint of a run that has nothing left to train."""
        self._load_from_checkpoint(str(folder))
        state = checkpoint.read_state(folder)
        self.kl_coef, self.seconds = state["kl_coef"], state["seconds"]
        self.state.global_step = self.args.max_steps

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Done with the optimiser."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to do: a phase seeds every generator itself."""

    def _send_telemetry(self) -> None:
        """TRL reports which trainers are used; this one does not."""


def sample_what_is_scored(model: Any, eos_token_ids: Iterable[int], pad_token_id: Any) -> None:
    """Drop generation settings that came with a model (top-k, penalties, suppressed tokens ...).

    Scoring knows the temperature alone, so anything else would make samples that the policy did not produce.
    """
    model.generation_config = GenerationConfig(
        eos_token_id=list(eos_token_ids), pad_token_id=pad_token_id, bos_token_id=model.config.bos_token_id
    )
