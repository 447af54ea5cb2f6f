"""A phase of RLHF, read from top to bottom: PPO, GRPO and RLOO as a subclass of TRL's GRPOTrainer.

A phase is one rollout, `generation_batch_size` completions, and `num_iterations` epochs of
`steps_per_generation / gradient_accumulation_steps` optimiser steps on it:

    rollout     prompts, samples, scores, log-probabilities of the policy and of its reference, rewards, advantages
    loss        of a micro-batch: clipped surrogate, clipped value loss, KL, entropy

TRL's trainer loads the prompts, runs the optimiser, calls the rewards and makes the reference model.
"""

import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import set_seed
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.grpo_trainer import GRPOTrainer

from saerl_cli.config.algo import LOGITS_HELD
from saerl_cli.rl.policy import reference_of
from saerl_cli.rl.rollouts.batch import MicroBatch, Rollout, Scores, Sequences
from saerl_cli.rl.rollouts.prefix import Prefix, Recorded, find_prefix, leave_inputs_alone, take
from saerl_cli.rl.rollouts.sampling import (
    compact,
    left_padded,
    reset_generation_config,
    right_padded,
    sample,
    token_positions,
)
from saerl_cli.rl.rollouts.scoring import add_critic, add_scoring_head, copy_trunk
from saerl_cli.rl.training import statistics
from saerl_cli.rl.training.advantages import (
    explained_variance,
    gae,
    group_advantages,
    k1,
    k3,
    leave_one_out,
    token_rewards,
    whiten,
)
from saerl_cli.rl.training.base import EpochOrder, PhasedTrainer
from saerl_cli.rl.training.config import PPOConfig
from saerl_cli.rl.training.kl_control import next_coefficient
from saerl_cli.rl.training.losses import clipped_surrogate, clipped_value_loss, token_k3
from saerl_cli.rl.training.normalise import Normaliser
from saerl_cli.run import shards
from saerl_cli.run.seeds import derived_seed

EXACT_ROWS = 16
"""Completions a process and phase whose exact KL is computed beside the estimates."""


class PPOTrainer(PhasedTrainer, GRPOTrainer):
    """PPO with a critic, GRPO or RLOO; trains whatever the model or the PEFT method leaves trainable.

    The reference is the adapter switched off, an adapter named `ref` (added for splices that differ from the base model
    at delta = 0), or, without PEFT, a frozen copy loaded from the model's folder.

    Rows of `train_dataset` hold a `prompt` and optionally its `input_ids`, which are then used as they are.

    Args:
        args, kwargs: as for GRPOTrainer; `args` is a `PPOConfig`, a PEFT method comes as `peft_config`.
        on_phase, open_checkpoint: as for `PhasedTrainer`.

    Raises:
        ValueError: fewer prompts than a phase takes.
        Diverged: a reward, loss, gradient or parameter is not finite (during `train`).
    """

    _tag_names, _name = ["trl", "ppo"], "PPO"

    args: PPOConfig  # narrower than the base classes say
    train_dataset: Any
    _tokenizer: Any

    def __init__(self, *args: Any, **kwargs: Any):
        model, config = kwargs["model"], kwargs["args"]
        separate = config.algorithm == "ppo" and config.critic == "separate"
        trunk = copy_trunk(model) if separate else None  # before PEFT touches the model
        super().__init__(*args, **kwargs)
        if len(self.train_dataset) < self.prompts_of_a_phase:  # TRL would end the run at step 0 without a word
            raise ValueError(
                f"there are {len(self.train_dataset)} prompts, but one phase takes {self.prompts_of_a_phase}"
            )
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        reset_generation_config(base, self.eos_token_ids, self._tokenizer.pad_token_id)
        leave_inputs_alone(self.model)
        self.value_head = add_critic(base, trunk) if config.algorithm == "ppo" else None
        add_scoring_head(base, self.temperature, config.critic == "detached", config.entropy_coef > 0)
        self.normaliser = Normaliser()
        self.kl_coef, self.kl_before = config.beta, config.kl_target or 0.0
        self.prefix: Prefix | None = None  # found before the first rollout: until then the model may still change
        self.prefix_sought = not config.prefix_cache
        self.micro_batches: list[MicroBatch] = []  # of the phase
        self.tokens = torch.zeros(())  # of the phase's completions, over all processes
        self.stopped = False  # whether the phase makes no further updates
        self.until_backward = ExitStack()  # what must last until the backward pass of a micro-batch is done
        self.rollout_statistics: dict[str, float] = {}
        self.update_statistics: list[Tensor] = []

    # --- data ---------------------------------------------------------------------------------------------------------

    @property
    def prompts_of_a_phase(self) -> int:
        """Prompts that all processes take for a phase."""
        return (self.args.generation_batch_size or 0) // self.args.num_generations

    @property
    def rows_at_once(self) -> int:
        """Rows a process takes for a phase: each prompt as often as it is completed."""
        return self.args.per_device_train_batch_size * self.args.micro_batches

    @property
    def order(self) -> Sampler:
        """The prompts of a phase, again for each of its micro-batches, of which only the first uses them."""
        args, repeats = self.args, self.args.micro_batches * self.args.num_iterations
        rows, epoch = len(self.train_dataset), lambda: int(self.state.epoch or 0)
        return EpochOrder(rows, self.prompts_of_a_phase, args.seed, epoch, args.num_generations, repeats)

    @property
    def begins_phase(self) -> bool:
        """Whether the next micro-batch is the first of a phase."""
        return self._step % (self.args.micro_batches * self.args.num_iterations) == 0

    def _prepare_inputs(self, rows: Any) -> MicroBatch:
        """Give the next micro-batch; the first of a phase makes the rollout."""
        if self.begins_phase:
            self.begin_phase()
            self.micro_batches = self.rollout(rows)
        return self.micro_batches[self._step % self.args.micro_batches]

    def begin_phase(self) -> None:
        """Seed everything random in a phase: by the run's seed, the phase and the process."""
        self.phase_start, self.stopped = time.perf_counter(), False
        set_seed(derived_seed(self.args.seed, self.phase, self.accelerator.process_index))
        if self.sparsity is not None:  # the same in every process
            self.sparsity.begin_phase(derived_seed(self.args.seed, self.phase, 1_000_033))
        if not self.prefix_sought:
            self.prefix, self.prefix_sought = self.find_frozen_prefix(), True

    # --- the rollout --------------------------------------------------------------------------------------------------

    def rollout(self, rows: list[dict[str, Any]]) -> list[MicroBatch]:
        """Sample completions of some prompts and work out what they teach.

        Args:
            rows: of the data set, this process's of the phase.

        Returns:
            The micro-batches of an epoch, in the order in which they are learned from.
        """
        args, accelerator = self.args, self.accelerator

        # Prompts, and a completion of each
        prompt_ids = self.tokenize(rows)
        completion_ids = self.sample(prompt_ids)
        pad = self._tokenizer.pad_token_id
        padded = (*left_padded(prompt_ids, pad), *right_padded(completion_ids, pad))
        texts = Sequences(*(tensor.to(accelerator.device) for tensor in padded))
        mask = texts.mask.float()  # [B, T]
        self.tokens = accelerator.gather(texts.mask.sum()).sum()

        # Scores of all processes' completions, [processes * B], of which `own` are this process's
        raw, ended = self.reward(rows, completion_ids)
        total = raw @ self.reward_weights.to(raw)
        self.normaliser.learn(total)
        scores = self.normaliser(total) - (args.missing_eos_penalty or 0.0) * (1 - ended)
        own = slice(accelerator.process_index * len(rows), (accelerator.process_index + 1) * len(rows))

        # Log-probabilities of the policy, then of the reference, in the micro-batches of training: the same rows at the
        # same places of the same tensors give the same bits (kernels treat the end of a tensor otherwise than its
        # middle). What is frozen is recorded in the first pass and replayed in all others.
        seed = derived_seed(args.seed, self.phase, accelerator.process_index, 1)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).to(mask.device)
        parts, frozen = order.split(args.per_device_train_batch_size), []
        logp, logp_ref, values = torch.zeros_like(mask), torch.zeros_like(mask), torch.zeros_like(mask)
        with torch.no_grad():
            for part in parts:
                with self.prefix.record() if self.prefix else nullcontext({}) as recorded:
                    scored = self.score(self.model, texts.rows(part))
                frozen.append(recorded)
                logp[part] = scored.logp.float()
                if scored.values is not None:
                    values[part] = scored.values * mask[part]
            with self.reference() as reference:
                for part, recorded in zip(parts, frozen, strict=True):
                    with self.replaying(recorded):
                        logp_ref[part] = self.score(reference, texts.rows(part)).logp.float()

        # Advantages, [B, T] or [B, 1]
        returns = values
        if args.algorithm == "grpo":
            advantages = group_advantages(scores, args.num_generations, args.scale_rewards == "group")[own, None]
        elif args.algorithm == "rloo":
            penalised = scores - self.kl_coef * accelerator.gather(k1(logp, logp_ref, mask))
            advantages = leave_one_out(penalised, args.num_generations)[own, None]
        else:
            rewards = token_rewards(scores[own], logp, logp_ref, mask, self.kl_coef)  # [B, T]
            advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)
            if args.whiten_advantages:
                advantages = whiten(advantages, mask, accelerator.reduce)

        whole = Rollout(
            **vars(texts), logp=logp, logp_ref=logp_ref, values=values, advantages=advantages, returns=returns
        )
        micro_batches = [MicroBatch(whole.rows(p), recorded) for p, recorded in zip(parts, frozen, strict=True)]
        self.describe_rollout(whole, raw, scores, ended, micro_batches)
        return micro_batches

    def tokenize(self, rows: list[dict[str, Any]]) -> list[list[int]]:
        """Give each row's prompt as token ids: its own `input_ids`, or its text's."""
        if "input_ids" in rows[0]:
            return [row["input_ids"] for row in rows]
        return self._tokenizer([row["prompt"] for row in rows])["input_ids"]

    def sample(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Draw one completion a prompt from the policy, up to and including its first end token."""
        ids, mask = left_padded(prompt_ids, self._tokenizer.pad_token_id)
        device = self.accelerator.device
        unwrapped = unwrap_model_for_generation(  # with checkpointing off, under which no keys and values are kept
            self.model_wrapped,
            self.accelerator,
        )
        settings: Any = (self.max_completion_length, self.eos_token_ids, self.temperature)
        with unwrapped as model, compact(model), shards.whole_for_sampling(model):
            completions = sample(model, ids.to(device), mask.to(device), *settings)
            shards.barrier()
        return completions

    def reward(self, rows: list[dict[str, Any]], completion_ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Score completions.

        Returns:
            The parts of the reward, [processes * B, parts], and 1 where a completion has ended, [processes * B].
        """
        prompts = [row["prompt"] for row in rows]
        texts = self._tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        try:
            raw = self._calculate_rewards(rows, prompts, texts, completion_ids)
        except ValueError as error:
            raise ValueError(f"phase {self.phase + 1}: {error}") from error
        self.refuse_unless_finite("a reward", raw)
        ends = set(self.eos_token_ids)
        ended = torch.tensor([float(not ends.isdisjoint(ids)) for ids in completion_ids], device=raw.device)
        return raw, self.accelerator.gather(ended)

    def score(self, model: Any, texts: Sequences) -> Scores:
        """Score completions under a model in one pass."""
        ids, mask = texts.joined()  # [B, P + T]
        width = texts.mask.shape[1]
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :-width] = -100
        inputs = {"input_ids": ids, "attention_mask": mask}
        if not mask[:, 0].all():  # left padding matters to learned positions
            inputs["position_ids"] = token_positions(mask)
        with self.accelerator.autocast():
            out = model(**inputs, labels=labels, fused_lm_head=True)
        entropy, values = out.get("entropy"), out.get("state_values")
        return Scores(
            out.log_probs[:, -width:],
            None if entropy is None else entropy[:, -width:],
            None if values is None else values[:, :-1][:, -width:],  # a token's is that of the position before it
        )

    def reference(self) -> AbstractContextManager[Any]:
        """Give the reference inside."""
        return reference_of(self.accelerator.unwrap_model(self.model), self.ref_model)

    def replaying(self, frozen: Recorded) -> AbstractContextManager[Any]:
        """Replay inside what was recorded of some rows; nothing where nothing was."""
        return self.prefix.replay(frozen) if self.prefix and frozen else nullcontext()

    def find_frozen_prefix(self) -> Prefix | None:
        """Find the part of the model that training leaves alone."""
        model = self.accelerator.unwrap_model(self.model)
        ids = torch.arange(6, device=model.device).view(2, 3)

        def call() -> list[Tensor]:
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)
            return [out[name] for name in ("log_probs", "state_values") if out.get(name) is not None]

        model.eval()
        try:
            return find_prefix(model, call, (2, 3))
        finally:
            model.train()

    # --- an optimiser step --------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Compute the loss of a micro-batch, a mean over the tokens of an optimiser step however it is split."""
        args, batch = self.args, inputs.rollout
        self.until_backward.enter_context(self.replaying(inputs.frozen))
        now = self.score(model, batch)
        mask = batch.mask
        if args.algorithm == "rloo":  # one ratio a completion
            sums = ((now.logp * mask).sum(1), (batch.logp * mask).sum(1))  # [B]
            rows = len(mask) * self.current_gradient_accumulation_steps
            loss = clipped_surrogate(*sums, batch.advantages[:, 0], args.epsilon).sum() / rows
            log_ratio = (sums[0] - sums[1]).detach()[:, None].expand_as(mask)
        else:
            losses = clipped_surrogate(now.logp, batch.logp, batch.advantages, args.epsilon)  # [B, T]
            if args.algorithm == "grpo":
                losses = losses + self.kl_coef * token_k3(now.logp, batch.logp_ref)
            loss = (losses * mask).sum() / self.tokens_of_a_step
            log_ratio = (now.logp.detach() - batch.logp) * mask
        value_losses = None
        if now.values is not None:
            value_losses = clipped_value_loss(now.values, batch.values, batch.returns, args.cliprange_value)  # [B, T]
            loss = loss + args.vf_coef * (value_losses * mask).sum() / self.tokens_of_a_step
        if args.entropy_coef:
            loss = loss - args.entropy_coef * (now.entropy * mask).sum() / self.tokens_of_a_step
        self.update_statistics.append(
            statistics.update_sums(mask, log_ratio, batch.advantages, args.epsilon, now.entropy, value_losses)
        )
        return self.checked(loss)

    @property
    def tokens_of_a_step(self) -> Tensor:
        """What a sum over a micro-batch's tokens is divided by.

        The phase's tokens per micro-batch and process times the micro-batches of an optimiser step: every token of a
        phase weighs the same, however the phase is split over steps, micro-batches and processes.
        """
        tokens = self.tokens.clamp(min=1.0) / self.accelerator.num_processes
        return tokens * self.current_gradient_accumulation_steps / self.args.micro_batches

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Learn from a micro-batch, or from nothing where the phase has stopped: steps count on as always.

        What is replayed stays so for the recomputations of activation checkpointing.
        """
        if self.stopped and not self.begins_phase:
            self._step += 1
            return torch.zeros((), device=self.accelerator.device)
        with self.until_backward:
            return super().training_step(model, inputs, num_items_in_batch)

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

    # --- statistics ---------------------------------------------------------------------------------------------------

    def describe_rollout(
        self, whole: Rollout, raw: Tensor, scores: Tensor, ended: Tensor, micro_batches: list[MicroBatch]
    ) -> None:
        """Keep a phase's statistics of its completions over all processes.

        Args:
            whole: the rollout.
            raw: parts of the reward, [processes * B, parts].
            scores: what is learned from, [processes * B].
            ended: 1 where an end token came, [processes * B].
            micro_batches: of the rollout.
        """
        gather, mask = self.accelerator.gather, whole.mask.float()
        logp, logp_ref = whole.logp, whole.logp_ref
        columns = torch.stack([k1(logp, logp_ref, mask), k3(logp, logp_ref, mask), mask.sum(1)], dim=1)
        self.rollout_statistics = {
            **statistics.reward_statistics(raw, self.reward_weights.to(raw), self.reward_func_names),
            **self.normaliser.metrics,
            **statistics.length_and_kl(gather(columns), gather(self.exact_kl(micro_batches)), ended),
        }
        penalty = self.kl_coef * self.rollout_statistics["kl"]
        self.rollout_statistics["reward_with_kl"] = scores.mean().item() - penalty
        if self.value_head is not None:
            returns, values, reduce = whole.returns, whole.values, self.accelerator.reduce
            self.rollout_statistics["explained_variance"] = explained_variance(values, returns, mask, reduce)

    @torch.no_grad()
    def exact_kl(self, micro_batches: list[MicroBatch]) -> Tensor:
        """KL(policy || reference) of every next-token distribution along some completions, summed; [rows], nats.

        Over the whole vocabulary, which a scoring pass never shows, hence in passes of their own, of the first
        `EXACT_ROWS` completions that this process learns from, or of all where the KL is to be controlled.
        """
        size, width = micro_batches[0].rollout.mask.shape
        wanted = size * len(micro_batches) if self.args.kl_target else EXACT_ROWS
        at_once = max(1, LOGITS_HELD // (self.model.config.get_text_config().vocab_size * (width + 1)))
        found = [
            self.divergence(batch.rollout.rows(rows), take(batch.frozen, rows))
            for start, batch in zip(range(0, wanted, size), micro_batches, strict=False)
            for rows in torch.arange(min(size, wanted - start), device=batch.rollout.mask.device).split(at_once)
        ]
        return torch.cat(found)

    def divergence(self, rollout: Rollout, frozen: Recorded) -> Tensor:
        """Compute the exact KL along completions, [B]."""
        ids, mask = rollout.joined()
        width = rollout.mask.shape[1]
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": token_positions(mask)}

        def distributions(model: Any) -> Tensor:  # [B, T, vocabulary]
            with self.accelerator.autocast(), self.replaying(frozen):
                logits = model(**inputs, logits_to_keep=width + 1).logits[:, :-1].float()
            return (logits if self.temperature == 1 else logits / self.temperature).log_softmax(-1)

        logp = distributions(self.model)
        with self.reference() as reference:
            difference = logp - distributions(reference)
        return ((logp.exp() * difference).sum(-1) * rollout.mask).sum(1)

    def phase_metrics(self, logs: dict[str, float]) -> dict[str, float]:
        """Give the statistics of the phase that just ended, over all processes; adapts the KL coefficient."""
        metrics = super().phase_metrics(logs)
        sums = self.accelerator.reduce(torch.stack(self.update_statistics).sum(0))
        self.update_statistics = []
        rollouts, seconds = self.rollout_statistics, metrics["seconds"]
        metrics = {
            **rollouts,
            **statistics.update_means(sums),
            **metrics,
            "kl_coef": self.kl_coef,
            "tokens_per_second": rollouts["tokens"] / seconds,
            "samples_per_second": rollouts["episodes"] / seconds,
        }
        if self.args.kl_target is not None:
            kl, before = metrics["kl_exact"], self.kl_before
            self.kl_coef = next_coefficient(self.kl_coef, kl, before, self.args.kl_target, self.args.kl_gain)
            self.kl_before = kl
        return metrics

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def geometry(self) -> dict[str, Any]:
        """And the completions of a phase."""
        args = self.args
        return super().geometry() | {"rollouts": args.generation_batch_size, "group": args.num_generations}

    def adaptive_state(self) -> dict[str, Any]:
        """And what the KL coefficient and the normalisation of scores depend on."""
        own = {"kl_coef": self.kl_coef, "kl_before": self.kl_before, "normaliser": self.normaliser.state()}
        return super().adaptive_state() | own

    def load_adaptive_state(self, state: dict[str, Any]) -> None:
        """Take over what `adaptive_state` gave."""
        super().load_adaptive_state(state)
        self.normaliser.load(state["normaliser"])
        self.kl_coef, self.kl_before = state["kl_coef"], state["kl_before"]
