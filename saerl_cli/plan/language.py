"""`saerl train-lm` and `saerl train-reward` before they run."""

import torch
from transformers import AutoModelForSequenceClassification

from saerl_cli.config.groups import DataKind, ModelKind, Precision
from saerl_cli.config.train_lm import TrainLmConfig
from saerl_cli.config.train_reward import TrainRewardConfig
from saerl_cli.data.pairs import read_pairs
from saerl_cli.jobs.train_lm import VOCABULARY_LIMIT
from saerl_cli.models import context_size, describe, without_weights
from saerl_cli.plan.meta import Estimate, count, language_model, sequence, size, trunk, weights

HELDOUT_TOKENS = 130_000
"""On which a new model's loss is measured, about."""
UNKNOWN_PAIRS = 100_000
"""Pairs of a file that is not there yet."""


def train_lm(config: TrainLmConfig) -> Estimate:
    """A language model from scratch.

    Raises:
        ValueError: a model that train-lm does not make.
    """
    if config.model.kind is not ModelKind.planted:
        raise ValueError("train-lm makes a new model: leave model=planted and give its sizes in model.planted")
    planted, launch, description, notes = config.model.planted, config.launch, describe(config.model), []
    if config.data.kind is not DataKind.planted:
        description.vocab_size = VOCABULARY_LIMIT
        notes.append(f"the vocabulary of the text is taken to have {VOCABULARY_LIMIT} words")
    model = without_weights(description).requires_grad_(True)
    n, rows = count(model.parameters()), planted.batch_size / launch.num_processes
    one = sequence(model, planted.context_size, config.model, launch)
    logits, heldout = rows * one.tokens * one.logits, HELDOUT_TOKENS / one.tokens
    return Estimate(
        {"language model": n, "trained": n},
        weights(model, launch) | {"gradients": 4.0 * n / launch.shards, "optimiser": 8.0 * n / launch.shards},
        one,
        one.passes(heldout, one.tokens, split=heldout / rows),
        3 * logits,
        "steps",
        planted.steps,
        one.passes(rows, one.tokens, back=True),
        rows * one.saved + 4 * logits,
        {"model": 4.0 * n, "checkpoint": 12.0 * n},
        notes,
    )


def train_reward(config: TrainRewardConfig) -> Estimate:
    """A reward model: every weight and a score head, two sequences a pair."""
    model, launch = language_model(config.model), config.launch
    model.config.num_labels = 1
    with torch.device("meta"):
        scored = AutoModelForSequenceClassification.from_config(model.config)
    n, held = count(scored.parameters()), size(scored.parameters())
    longest = min(config.max_length or context_size(model.config), context_size(model.config))
    trunk(model).requires_grad_(True)
    one = sequence(model, longest, config.model, launch)
    rows = 2 * config.batch_size / launch.num_processes
    micro = 2 * config.micro_batch if config.micro_batch else rows
    notes = [f"replies are counted as long as max_length allows: {longest} tokens"]
    try:
        pairs = len(read_pairs(config.pairs, config.model, "train"))
    except ValueError:
        pairs = config.pairs.count or UNKNOWN_PAIRS
        notes.append(f"{config.pairs.path} is not there: taken to hold {pairs:,} pairs (pairs.count says otherwise)")
    return Estimate(
        {"language model": count(model.parameters()), "trained": n},
        {"reward model": held, "gradients": 4.0 * n * (1 + (launch.num_processes > 1)), "optimiser": 8.0 * n},
        one,
        one.passes(4 * config.pairs.heldout, split=config.pairs.heldout / 8),
        0.0,
        "steps",
        config.epochs * (pairs // config.batch_size),
        one.passes(rows, back=True, split=rows / micro),
        micro * one.saved + 2.0 * n * (launch.mixed_precision is not Precision.no),
        {"model": 4.0 * n, "checkpoint": 12.0 * n},
        notes,
    )
