"""Reward-weighted regression: the policy class's nearest point to the KL-optimal policy, without exploration or critic.

The best policy at its KL is `pi* ~ pi_ref exp(r / beta)`. Of many completions of a prompt that the reference wrote,
each weighs `w_i ~ exp(r_i / beta)` as pi* would have it, and maximum likelihood under these weights minimises
KL(pi* || pi) over what the adapter can express (Peters and Schaal 2007; for language models Korbak et al. 2022). What
such a fit lacks is missing from the class of policies; what PPO lacks beside it is missing from PPO.

RUN/draws.jsonl     the completions, a line each: {prompt, completion_ids, reward, weight}
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from trl.trainer.sft_trainer import SFTTrainer as TRLSFTTrainer

from saerl_cli.data.prompts import Prompt
from saerl_cli.rewards.score import TOTAL, Reward
from saerl_cli.rl.evaluation.measure import generate
from saerl_cli.rl.training.supervised import SFTTrainer
from saerl_cli.run.directory import Run, write_jsonl
from saerl_cli.run.files import read_jsonl
from saerl_cli.run.progress import say
from saerl_cli.run.seeds import derived_seed

if TYPE_CHECKING:
    from saerl_cli.config.rlhf import RlhfConfig

FILE = "draws.jsonl"
NEGLIGIBLE = 0.01
"""Completions whose weight, 1 on average, is below this are left out of training."""
FEW = 2.0
"""Effective completions a prompt below which the weights rest on single completions."""


# --- the trainer -----------------------------------------------------------------------------------------------------


class WeightedLikelihood(TRLSFTTrainer):
    """TRL's SFTTrainer with the loss `-mean_i w_i sum_t log pi(y_it) / longest`, of tempered log-probabilities."""

    loss_is_scaled_for_ga = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of a micro-batch; `inputs` are those of `pad_weighted`."""
        args: Any = self.args
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
        logits = logits[:, :-1].float() / args.temperature  # [batch, seq - 1, vocabulary]
        nll = functional.cross_entropy(
            logits.transpose(1, 2), inputs["labels"][:, 1:], reduction="none"
        )  # [batch, seq-1]
        return (inputs["weights"] * nll.sum(1)).mean() / args.longest


class RWRTrainer(SFTTrainer, WeightedLikelihood):
    """Weighted maximum likelihood of given completions, exact as every trainer here."""

    def __init__(self, *args: Any, **kwargs: Any):
        pad = kwargs["processing_class"].pad_token_id
        super().__init__(*args, data_collator=pad_weighted(pad), **kwargs)
        self.model_accepts_loss_kwargs = False  # the mean over micro-batches is the mean over the batch


def pad_weighted(pad: int) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Rows of `prompt_ids`, `completion_ids` and `weight` as tensors padded on the right."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [torch.tensor([*row["prompt_ids"], *row["completion_ids"]]) for row in rows]
        labels = [torch.tensor([-100] * len(row["prompt_ids"]) + row["completion_ids"]) for row in rows]
        rnn = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": rnn(ids, batch_first=True, padding_value=pad),  # [batch, seq]
            "attention_mask": rnn([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": rnn(labels, batch_first=True, padding_value=-100),
            "weights": torch.tensor([row["weight"] for row in rows]),  # [batch]
        }

    return collate


# --- what it learns from ---------------------------------------------------------------------------------------------


def draws(
    config: "RlhfConfig",
    run: Run,
    model: Any,
    tokenizer: Any,
    ends: list[int],
    prompts: Sequence[Prompt],
    reward: Reward,
) -> Dataset:
    """Completions of the untouched model on prompts of training, each with its weight; drawn once, kept in the run.

    Every process draws them itself, alike: they are a function of the seed.

    Raises:
        ValueError: fewer prompts than `algo.draws / algo.group`.
    """
    algo = config.algo
    count = algo.draws // algo.group_size
    if len(prompts) < count:
        raise ValueError(
            f"algo.draws={algo.draws} at algo.group={algo.group_size} takes {count} prompts, but there are"
            f" {len(prompts)}; lower algo.draws to {len(prompts) * algo.group_size}, or raise algo.group"
        )
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(derived_seed(config.seed, 11)))
    chosen = [prompts[i] for i in order[:count].tolist() for _ in range(algo.group_size)]
    found = read_jsonl(run.path / FILE)
    if len(found) != len(chosen):
        say(f"drawing {len(chosen)} completions of {count} prompts from the untouched model")
        found = weighted_samples(config, model, tokenizer, ends, chosen, reward)
        if run.writes:
            write_jsonl(run.path / FILE, found)
    effective = effective_number(torch.tensor([row["weight"] for row in found]).view(count, -1))
    run.update(draws={"completions": len(found), "prompts": count, "effective_a_prompt": effective})
    if effective < FEW:
        say(
            f"WARNING: of {algo.group_size} completions a prompt {effective:.1f} carry the weight; raise algo.group, or"
            f" algo.kl_coef={algo.kl_coef:g}"
        )
    return Dataset.from_list(
        [
            {"prompt_ids": list(p.input_ids), "completion_ids": row["completion_ids"], "weight": row["weight"]}
            for p, row in zip(chosen, found, strict=True)
            if row["weight"] > NEGLIGIBLE
        ]
    )


def weighted_samples(
    config: "RlhfConfig", model: Any, tokenizer: Any, ends: list[int], chosen: Sequence[Prompt], reward: Reward
) -> list[dict[str, Any]]:
    """The lines of RUN/draws.jsonl: a completion of each of `chosen`, where a prompt stands `algo.group_size` times."""
    algo = config.algo
    settings = (algo.max_new_tokens, algo.temperature, config.evaluation.batch_size, derived_seed(config.seed, 12))
    ids = generate(model, chosen, tokenizer, ends, *settings)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    scores = reward.score([p.text for p in chosen], texts, ids, [p.answer for p in chosen])[TOTAL]
    weights = optimal_weights(torch.tensor(scores).view(-1, algo.group_size), algo.kl_coef).flatten().tolist()
    rows = zip(chosen, ids, scores, weights, strict=True)
    return [{"prompt": p.text, "completion_ids": i, "reward": r, "weight": w} for p, i, r, w in rows]


def optimal_weights(rewards: Tensor, beta: float) -> Tensor:
    """`exp(r / beta)` of rewards [prompts, completions], 1 on average over the completions of a prompt."""
    return (rewards.double() / beta).softmax(1) * rewards.shape[1]


def effective_number(weights: Tensor) -> float:
    """Kish's effective sample size `(sum w)^2 / sum w^2` of weights [prompts, completions], mean over prompts."""
    return (weights.sum(1) ** 2 / (weights**2).sum(1)).mean().item()
