"""Algorithms that learn from given sequences: TRL's own SFT and DPO, made exact, and what they are measured by."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler
from transformers import set_seed
from trl.trainer.dpo_trainer import DPOTrainer as TRLDPOTrainer
from trl.trainer.sft_trainer import SFTTrainer as TRLSFTTrainer
from trl.trainer.utils import disable_dropout_in_model

from saerl_cli.activations import token_rows
from saerl_cli.config.algo import AlgoKind
from saerl_cli.config.rlhf import RlhfConfig
from saerl_cli.data.documents import row_length
from saerl_cli.data.examples import Example, read_examples, split_examples, training_documents
from saerl_cli.data.pairs import read_pairs
from saerl_cli.data.prompts import leading_tokens
from saerl_cli.models import Loaded
from saerl_cli.rl.policy import reference_of
from saerl_cli.rl.trainers.exact import ExactTrainer, derived_seed
from saerl_cli.run.progress import say

Labelled = tuple[list[int], list[int]]
"""Token ids and labels of a sequence; a label of -100 does not count."""
MEASURED_ROWS = 512
"""Held-out rows or pairs that the loss, or the preference, is measured on."""


# --- trainers --------------------------------------------------------------------------------------------------------


class EpochOrder(Sampler[int]):
    """A permutation that is a function of seed and epoch, without the rows that fill no whole optimiser step."""

    def __init__(self, rows: int, step: int, seed: int, epoch: Callable[[], int]):
        self.rows, self.size, self.seed, self.epoch = rows, rows // step * step, seed, epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch()))
        yield from torch.randperm(self.rows, generator=generator)[: self.size].tolist()


class SupervisedTrainer(ExactTrainer):
    """Mixed in before SFTTrainer or DPOTrainer. Rows of `train_dataset` are tokens already.

    Raises:
        ValueError: fewer rows than an optimiser step takes.
    """

    train_dataset: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        disable_dropout_in_model(self.model)
        if len(self.train_dataset) < self.rows_of_a_step:
            raise ValueError(
                f"there are {len(self.train_dataset)} sequences or pairs, but one optimiser step takes"
                f" {self.rows_of_a_step}; lower algo.batch_size or give more text"
            )

    @property
    def rows_of_a_step(self) -> int:
        """Sequences or pairs of an optimiser step, over all processes."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        rows = len(self.train_dataset if train_dataset is None else train_dataset)
        return EpochOrder(rows, self.rows_of_a_step, self.args.seed, lambda: int(self.state.epoch or 0))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; the first of a phase seeds everything random in it."""
        if not self.begun:
            self.begun, self.phase_start = True, time.perf_counter()
            set_seed(derived_seed(self.args.seed, self.phase, self.accelerator.process_index))
        return super().training_step(*args, **kwargs)

    begun = False
    """Whether the phase has begun."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The loss, which must be finite."""
        loss: Any = super().compute_loss(*args, **kwargs)
        self.refuse_unless_finite("the loss", loss.detach())
        return loss

    def phase_metrics(self, logs: dict[str, float]) -> dict[str, float]:
        """The means over the phase, TRL's own among them."""
        self.begun = False
        own = {name: math.fsum(values) / len(values) for name, values in self._metrics["train"].items() if values}
        own.pop("num_tokens", None)  # of this sitting alone
        metrics = super().phase_metrics(logs)
        samples = self.rows_of_a_step * self.args.steps_per_phase
        return {"loss": logs["loss"], **own, **metrics, "samples_per_second": samples / metrics["seconds"]}

    def geometry(self) -> dict[str, Any]:
        """And the rows of an optimiser step."""
        return super().geometry() | {"batch_size": self.rows_of_a_step, "rows": len(self.train_dataset)}


class SFTTrainer(SupervisedTrainer, TRLSFTTrainer):
    """Maximum likelihood.

    Args:
        args, kwargs: as for TRL's.
        frozen: of `adapter=full` the reference that the policy is measured against; by default a copy.
    """

    def __init__(self, *args: Any, frozen: Any = None, **kwargs: Any):
        if frozen is None and not kwargs.get("peft_config"):
            frozen = copy.deepcopy(kwargs["model"]).requires_grad_(False).eval()
        super().__init__(*args, **kwargs)
        self.ref_model = frozen


class DPOTrainer(SupervisedTrainer, TRLDPOTrainer):
    """Direct preference optimisation; the reference is the adapter off, or a frozen copy for `adapter=full`."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """Nothing to do: rows are tokens already, each side following its prompt as a completion would."""
        return dataset


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass
class Examples:
    """Rows of token ids: `input_ids` and `labels` (sft), or `prompt_ids`, `chosen_ids` and `rejected_ids` (dpo)."""

    train: Dataset
    heldout: Dataset


def build_examples(config: RlhfConfig, loaded: Loaded) -> Examples:
    """What a supervised algorithm learns from, tokenised; sequences longer than the model's context are left out.

    Raises:
        ValueError: text that cannot be read, or nothing that fits the context.
    """
    algo, tokenizer, context = config.algo, loaded.tokenizer, loaded.context_size
    if algo.kind is AlgoKind.dpo:
        sides = {split: read_pairs(algo.pairs, config.model, split) for split in ("train", "heldout")}
        rows = {name: [pair_row(pair, tokenizer) for pair in pairs] for name, pairs in sides.items()}
    elif algo.examples is not None:
        train, heldout = split_examples(read_examples(algo.examples), config.data.heldout)
        rows = {"train": [example_row(example, tokenizer) for example in train]}
        rows["heldout"] = [example_row(example, tokenizer) for example in heldout]
    else:
        length = row_length(config.data, context)
        rows = {}
        for split in ("train", "heldout"):
            texts = training_documents(config.data, config.model, algo.attribute, split)
            rows[split] = [packed_row(row) for row in token_rows(texts, tokenizer, length).tolist()]
    return Examples(*(fitting(rows[split], context, split) for split in ("train", "heldout")))


def packed_row(ids: list[int]) -> dict[str, list[int]]:
    """A row of packed documents; separators that only fill it up teach nothing."""
    separator = ids[0]
    filling = [a == b == separator for a, b in zip(ids, ids[1:], strict=False)]
    return {"input_ids": ids, "labels": [-100, *(-100 if f else i for i, f in zip(ids[1:], filling, strict=True))]}


def example_row(example: Example, tokenizer: Any) -> dict[str, list[int]]:
    """A prompt and its completion with an end token; only the completion teaches."""
    prompt = [*leading_tokens(tokenizer), *encode(tokenizer, example.prompt)]
    completion = [*encode(tokenizer, example.completion), tokenizer.eos_token_id]
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


def pair_row(pair: Any, tokenizer: Any) -> dict[str, list[int]]:
    """A prompt and its two continuations, each with an end token."""
    return {
        "prompt_ids": [*leading_tokens(tokenizer), *encode(tokenizer, pair.prompt)],
        "chosen_ids": [*encode(tokenizer, pair.chosen), tokenizer.eos_token_id],
        "rejected_ids": [*encode(tokenizer, pair.rejected), tokenizer.eos_token_id],
    }


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def fitting(rows: list[dict[str, list[int]]], context: int, split: str) -> Dataset:
    """The rows that the model can read whole.

    Raises:
        ValueError: there are none.
    """

    def length(row: dict[str, list[int]]) -> int:
        if "prompt_ids" in row:
            return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        return len(row["input_ids"])

    kept = [row for row in rows if length(row) <= context]
    if not kept:
        raise ValueError(f"none of the {len(rows)} {split} sequences fits the model's context of {context} tokens")
    if len(kept) < len(rows):
        say(f"left out {len(rows) - len(kept)} of {len(rows)} {split} sequences longer than {context} tokens")
    return Dataset.from_list(kept)


# --- measures --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def log_likelihoods(model: Any, rows: list[Labelled], batch_size: int = 16) -> list[tuple[float, int]]:
    """Sum of log-probabilities, and number, of the labelled tokens of each row."""
    found = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        width = max(len(ids) for ids, _ in part)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in part], device=model.device)
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in part], device=model.device)
        labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in part], device=model.device)[:, 1:]
        logp = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float().log_softmax(-1)  # [n, L - 1, V]
        kept = labels != -100
        chosen = logp.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1).double() * kept
        found += zip(chosen.sum(1).tolist(), kept.sum(1).tolist(), strict=True)
    return found


def first_rows(heldout: Dataset) -> list[dict[str, Any]]:
    """As many held-out rows as are measured."""
    return heldout.select(range(min(len(heldout), MEASURED_ROWS))).to_list()


def example_loss(model: Any, heldout: Dataset) -> float:
    """Mean negative log-likelihood of the labelled tokens of held-out rows, nats per token."""
    rows = [(row["input_ids"], row["labels"]) for row in first_rows(heldout)]
    sums = log_likelihoods(model, rows)
    return -math.fsum(total for total, _ in sums) / max(1, sum(count for _, count in sums))


def preferences(model: Any, frozen: Any, heldout: Dataset) -> dict[str, float]:
    """How a policy judges held-out pairs.

    Returns:
        pairs_accuracy: the share whose chosen side gained more log-probability over the reference than the rejected
        one; pairs_margin: by how much on average, nats.
    """
    pairs = first_rows(heldout)
    rows = [
        (pair["prompt_ids"] + pair[side], [-100] * len(pair["prompt_ids"]) + pair[side])
        for side in ("chosen_ids", "rejected_ids")
        for pair in pairs
    ]
    policy = [total for total, _ in log_likelihoods(model, rows)]
    with reference_of(model, frozen) as reference:
        gains = [a - b for a, (b, _) in zip(policy, log_likelihoods(reference, rows), strict=True)]
    margins = [chosen - rejected for chosen, rejected in zip(gains[: len(pairs)], gains[len(pairs) :], strict=True)]
    right = sum((margin > 0) + 0.5 * (margin == 0) for margin in margins)
    return {"pairs_accuracy": right / len(margins), "pairs_margin": math.fsum(margins) / len(margins)}
