"""Trainers that write completions: which prompts, with which random numbers, what they scored, how far they strayed."""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import set_seed
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from saerl_cli.rl.evaluation.behaviour import tail
from saerl_cli.rl.frozen.head import HELD
from saerl_cli.rl.frozen.once import OnceTrainer
from saerl_cli.rl.policy import reference_of
from saerl_cli.rl.trainers import ppo_math
from saerl_cli.rl.trainers.exact import derived_seed, sample_what_is_scored
from saerl_cli.rl.trainers.kl_control import next_coefficient
from saerl_cli.rl.trainers.normalise import Normaliser

Base = GRPOTrainer if TYPE_CHECKING else object
"""What the classes here are mixed into."""

EXACT_ROWS = 16
"""Completions a process and phase whose exact KL is computed beside the estimates."""


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


class RolloutTrainer(OnceTrainer, Base):
    """Mixed in before GRPOTrainer or RLOOTrainer.

    Rows of `train_dataset` hold a `prompt` and optionally its `input_ids`, which are then used as they are.

    Raises:
        ValueError: fewer prompts than a generation batch needs.
    """

    train_dataset: Any
    sequence_ratio = False
    """Whether the clipped ratio is that of a whole completion."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        needed = (self.args.generation_batch_size or 0) // self.args.num_generations
        if len(self.train_dataset) < needed:  # TRL would end the run at step 0 without a word
            raise ValueError(f"there are {len(self.train_dataset)} prompts, but one phase takes {needed}")
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        sample_what_is_scored(base, self.eos_token_ids, self._tokenizer.pad_token_id)
        self.prompt_ids: dict[str, list[int]] = {}
        self.raw_rewards = torch.zeros(0)  # of the last generation: [processes * B, parts]
        self.normaliser = Normaliser()
        self.scores = torch.zeros(0)  # their weighted sum, normalised, less the missing ends' penalty: [processes * B]
        self.ended = torch.zeros(0)  # [processes * B]
        self.kl_coef, self.kl_before = self.args.beta, self.args.kl_target or 0.0
        self.rollout_statistics: dict[str, float] = {}
        self.update_statistics: list[Tensor] = []
        self.passes: list[Tensor] = []  # log-probabilities [B, T] of every scoring pass since it was last emptied
        self.state_values: list[Tensor] = []  # [B, T] of the same passes, where there is a critic
        self.entropies: Tensor | None = None

    # --- data -------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        stock: Any = super()._get_train_sampler(dataset)
        return EpochSampler(stock, lambda: int(self.state.epoch or 0))

    def _tokenize_prompts(self, prompts: list) -> tuple:
        if self.prompt_ids:
            return [self.prompt_ids[prompt] for prompt in prompts], None, {}
        return super()._tokenize_prompts(prompts)

    # --- a phase begins ---------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Tensor | Any]:
        if self.model.training:  # everything random in a phase follows from this
            self.phase_start = time.perf_counter()
            set_seed(derived_seed(self.args.seed, self.phase, self.accelerator.process_index))
            if self.restraint is not None:  # the same in every process
                self.restraint.begin_phase(derived_seed(self.args.seed, self.phase, 1_000_033))
        self.prompt_ids = {row["prompt"]: row["input_ids"] for row in inputs if "input_ids" in row}
        self.passes, self.state_values = [], []
        batch = super()._generate_and_score_completions(inputs)
        if len(self.passes) == 1:  # TRL skips the policy's pass where a phase is one optimiser step
            (reference,), self.passes, self.state_values = self.passes, [], []
            self.score_policy(batch)
            self.passes.append(reference)
        batch["old_per_token_logps"], batch["ref_per_token_logps"] = self.passes
        if self.model.training:
            self.describe_rollouts(batch)
        return batch

    @torch.no_grad()
    def score_policy(self, batch: dict[str, Any]) -> Tensor:
        """Log-probabilities [B, T] of the completions under the current policy."""
        ids, mask = whole(batch)
        width, size = batch["completion_ids"].shape[1], self.args.per_device_train_batch_size
        return self._get_per_token_logps_and_entropies(self.model, ids, mask, width, batch_size=size)[0]

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any, Any]:
        values: list[Tensor] = []

        def recording(**inputs: Any) -> Any:  # the base class only ever calls `model(...)`
            if not inputs["attention_mask"][:, 0].all():  # left padding matters to learned positions
                inputs["position_ids"] = positions(inputs["attention_mask"])
            out = model(**inputs)
            if out.get("state_values") is not None:  # the frozen copy of adapter=full has none
                values.append(out.state_values)
            return out

        logps, self.entropies, auxiliary = super()._get_per_token_logps_and_entropies(
            recording, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )
        self.passes.append(logps.detach())
        if values:  # the value before a token belongs to the position before it
            self.state_values.append(self.in_order(torch.cat(values))[:, :-1][:, -logits_to_keep:])
        return logps, self.entropies, auxiliary

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self.passes, self.state_values = [], []
        return super()._compute_loss(model, inputs)

    # --- scores -----------------------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs: list, prompts: list, completions: list, completion_ids_list: list) -> Tensor:
        """The reward's parts [processes * B, parts], changed where what is learned from is not their weighted sum."""
        try:
            raw = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        except ValueError as error:
            raise ValueError(f"phase {self.phase + 1}: {error}") from error
        self.refuse_unless_finite("a reward", raw)
        ends = set(self.eos_token_ids)
        ended = torch.tensor([float(not ends.isdisjoint(ids)) for ids in completion_ids_list], device=raw.device)
        weights = self.reward_weights.to(raw)
        self.raw_rewards, self.ended = raw, self.accelerator.gather(ended)
        total = raw @ weights
        if self.model.training:
            self.normaliser.learn(total)
        self.scores = self.normaliser(total) - (self.args.missing_eos_penalty or 0.0) * (1 - self.ended)
        if self.scores.equal(total):
            return raw
        heaviest = int(weights.abs().argmax())
        shaped = torch.zeros_like(raw)
        shaped[:, heaviest] = self.scores / weights[heaviest]
        return shaped

    def local_scores(self, size: int) -> Tensor:
        """The scores of this process's completions; [B]."""
        start = self.accelerator.process_index * size
        return self.scores[start : start + size]

    # --- statistics -------------------------------------------------------------------------------------------------

    def describe_rollouts(self, batch: dict[str, Any]) -> None:
        """Statistics of a phase's completions over all processes."""
        mask = batch["completion_mask"].float()  # [B, T]
        logp, logp_ref = batch["old_per_token_logps"].float(), batch["ref_per_token_logps"].float()
        columns = [ppo_math.k1(logp, logp_ref, mask), ppo_math.k3(logp, logp_ref, mask), mask.sum(1)]
        rows = self.accelerator.gather(torch.stack(columns, dim=1))  # [processes * B, 3]
        kl, kl_k3, length = rows.mean(0).tolist()
        total = self.raw_rewards @ self.reward_weights.to(self.raw_rewards)
        parts = zip(self.reward_func_names, self.raw_rewards.mean(0).tolist(), strict=True)
        self.rollout_statistics = {
            "reward": total.mean().item(),
            "reward_std": total.std().item(),
            **tail_metrics(total.tolist()),
            **self.normaliser.metrics,
            **{f"reward/{name}": value for name, value in parts},
            "kl": kl,
            "kl_k3": kl_k3,
            "kl_exact": self.accelerator.gather(self.exact_kl(batch)).mean().item(),
            "length": length,
            "ended": self.ended.mean().item(),
            "tokens": rows[:, 2].sum().item(),
            "episodes": len(rows),
        }

    @torch.no_grad()
    def exact_kl(self, batch: dict[str, Any]) -> Tensor:
        """KL(policy || reference) of every next-token distribution along some of the completions, summed; [rows], nats.

        Over the whole vocabulary, which the fused head never shows, hence in passes of their own: `EXACT_ROWS`
        completions of this process, or all of them where the KL is to be controlled.
        """
        ids, mask = whole(batch)
        count = len(ids) if self.args.kl_target else min(EXACT_ROWS, len(ids))
        rows = torch.linspace(0, len(ids) - 1, count, device=ids.device).long()
        kept = batch["completion_mask"].float()
        width, held = kept.shape[1], HELD // self.model.config.get_text_config().vocab_size
        size = min(self.args.per_device_train_batch_size, max(1, held // (width + 1)))

        def distributions(model: Any, part: Tensor) -> Tensor:  # [rows, T, vocabulary]
            inputs = {"input_ids": ids[part], "attention_mask": mask[part], "position_ids": positions(mask[part])}
            with self.accelerator.autocast():
                logits = model(**inputs, logits_to_keep=width + 1).logits[:, :-1].float()
            return (logits if self.temperature == 1 else logits / self.temperature).log_softmax(-1)

        found, unwrapped = [], self.accelerator.unwrap_model(self.model)
        for part in rows.split(size):
            with self.replaying(batch, part):
                logp = distributions(self.model, part)
            with reference_of(unwrapped, self.ref_model) as reference, self.replaying(batch, part):
                difference = logp - distributions(reference, part)
            found.append(((logp.exp() * difference).sum(-1) * kept[part]).sum(1))
        return torch.cat(found)

    @torch.no_grad()
    def describe_update(self, inputs: dict[str, Any], *more: Tensor) -> None:
        """Keep sums over a micro-batch's tokens; `phase_metrics` turns them into means.

        Args:
            inputs: the micro-batch.
            more: further values of tokens, [B, T].
        """
        assert self.entropies is not None
        mask = inputs["completion_mask"].float()
        log_ratio = (self.passes[-1] - inputs["old_per_token_logps"]) * mask
        if self.sequence_ratio:
            log_ratio = log_ratio.sum(1, keepdim=True).expand_as(mask)
        ratio, advantages = log_ratio.exp(), inputs["advantages"]
        if advantages.ndim == 1:
            advantages = advantages[:, None]
        low, high = 1 - self.epsilon_low, 1 + self.epsilon_high
        clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
        columns = (ratio - 1 - log_ratio, clipped, (ratio - 1).abs(), self.entropies.detach(), *more)  # first: k3
        self.update_statistics.append(torch.stack([mask.sum(), *((c * mask).sum().float() for c in columns)]))

    def phase_metrics(self, logs: dict[str, float]) -> dict[str, float]:
        """The statistics of the phase that just ended, averaged over its tokens and all processes.

        Adapts the KL coefficient for the next phase.
        """
        metrics = super().phase_metrics(logs)
        tokens, *sums = self.accelerator.reduce(torch.stack(self.update_statistics).sum(0)).tolist()
        self.update_statistics = []
        names = ("approx_kl", "clip_fraction", "ratio_deviation", "entropy", "value_loss")
        rollouts, seconds = self.rollout_statistics, metrics["seconds"]
        metrics = rollouts | dict(zip(names, (s / max(tokens, 1) for s in sums), strict=False)) | metrics
        metrics |= {
            "kl_coef": self.kl_coef,
            "tokens_per_second": rollouts["tokens"] / seconds,
            "samples_per_second": rollouts["episodes"] / seconds,
        }
        if self.args.kl_target is not None:
            kl, before = metrics["kl_exact"], self.kl_before
            self.kl_coef = next_coefficient(self.kl_coef, kl, before, self.args.kl_target, self.args.kl_gain)
            self.kl_before = kl
        return metrics

    # --- checkpoints ------------------------------------------------------------------------------------------------

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


def tail_metrics(rewards: list[float]) -> dict[str, float]:
    """How heavy the upper tail of a phase's rewards is, as far as that can be told."""
    found = tail(rewards)
    names = {"reward_kurtosis": "kurtosis", "reward_hill": "hill", "reward_top_share": "top_share"}
    return {name: value for name, key in names.items() if (value := found[key]) is not None}


def whole(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Prompts with their completions: token ids and mask, both [B, P + T]."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    return ids, torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)


def positions(mask: Tensor) -> Tensor:
    """Position of every token among those that are no padding; [B, L]."""
    return (mask.cumsum(1) - 1).clamp(min=0)
