"""What supervised algorithms learn from, as token ids, and what they are measured by."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from saerl_cli.activations import token_rows
from saerl_cli.config.algo import AlgoKind
from saerl_cli.config.rlhf import RlhfConfig
from saerl_cli.data.documents import row_length
from saerl_cli.data.examples import Example, read_examples, split_examples, training_documents
from saerl_cli.data.pairs import read_pairs
from saerl_cli.data.prompts import leading_tokens
from saerl_cli.models import Loaded
from saerl_cli.rl.policy import reference_of
from saerl_cli.run.progress import say

Labelled = tuple[list[int], list[int]]
"""Token ids and labels of a sequence; a label of -100 does not count."""
MEASURED_ROWS = 512
"""Held-out rows or pairs that the loss, or the preference, is measured on."""

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
