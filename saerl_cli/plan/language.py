"""`saerl train-lm` and `saerl train-reward` before they run."""

from math import ceil

from saerl_cli.config.groups import DataKind, ModelKind
from saerl_cli.config.pairs import PairsKind
from saerl_cli.config.train_lm import TrainLmConfig
from saerl_cli.config.train_reward import TrainRewardConfig
from saerl_cli.jobs.train_lm import VOCABULARY_LIMIT
from saerl_cli.models import describe
from saerl_cli.plan.launches import weights
from saerl_cli.plan.policy import PHASE, TRAINER_STEP
from saerl_cli.plan.shapes import from_description, shape_of
from saerl_cli.plan.text import REVIEW_BYTES, reading
from saerl_cli.plan.work import SAVED, SIZE, Estimate, Phase, Work, adam, forward, logits, piece, small, start

PLANTED_PAIRS = 2000
"""Pairs of the planted language where settings do not say."""
HELDOUT_TOKENS = 130_000
"""Of the planted language, on which a new model's loss is measured."""


def train_lm(config: TrainLmConfig) -> Estimate:
    """A language model from scratch.

    Raises:
        ValueError: a model that train-lm does not make.
    """
    if config.model.kind is not ModelKind.planted:
        raise ValueError("train-lm makes a new model: leave model=planted and give its sizes in model.planted")
    planted, description = config.model.planted, describe(config.model)
    notes: list[str] = []
    if config.data.kind is not DataKind.planted:
        description.vocab_size = VOCABULARY_LIMIT
        notes.append(f"the vocabulary of the text is taken to have {VOCABULARY_LIMIT} words")
    shape = from_description(description)
    text, text_bytes, more = reading(config.data, config.model, REVIEW_BYTES)
    rows, seq, n = planted.batch_size, planted.context_size, shape.parameters
    tokens, parts = rows * seq, config.launch.shards
    step: Work = [
        (1, forward(shape, shape.layers, rows, seq, "float32", "weights")),
        (
            1,
            piece(
                "cross_entropy",
                6 * tokens * shape.embedding,
                4 * 8 * tokens * shape.vocabulary,
                20,
                width=shape.width,
                vocabulary=shape.vocabulary,
                tokens=tokens,
            ),
        ),
        (1, adam(n)),
        small(300),
    ]
    heldout = planted.documents // 10 * 35 if config.data.kind is DataKind.planted else HELDOUT_TOKENS
    measured = heldout / tokens
    return Estimate(
        "train-lm",
        1,
        "float32",
        {"language model": n, "trained": n},
        weights(shape, 4, config.launch)
        | {"gradients": 4.0 * n / parts, "optimiser": 8.0 * n / parts, "text": text_bytes},
        [
            Phase("start and text", 1, [(1, start("lm")), (1, start("command")), *text]),
            Phase(
                "steps",
                planted.steps,
                step,
                {
                    "activations": tokens * shape.layers * SAVED["weights"] * shape.width * 4,
                    "logits": 4.0 * 4 * tokens * shape.vocabulary,
                },
            ),
            Phase(
                "held-out loss",
                1,
                [
                    (measured, forward(shape, shape.layers, rows, seq, "float32")),
                    (measured, logits(shape, tokens, "float32")),
                ],
                {"logits": 3.0 * 4 * tokens * shape.vocabulary},
            ),
        ],
        {"model": 4.0 * n, "checkpoint": 12.0 * n},
        notes + more,
    )


def train_reward(config: TrainRewardConfig) -> Estimate:
    """A reward model: every weight and a score head, two sequences a pair."""
    shape, _ = shape_of(config.model)
    processes, dtype = config.launch.num_processes, "float32"
    computes = "float32" if config.launch.mixed_precision.value == "no" else "bfloat16"
    pairs, notes = number_of_pairs(config)
    length = min(config.max_length or shape.context, shape.context)
    notes.append(f"pairs are taken to be as long as max_length allows: {length} tokens a reply")
    micro = config.micro_batch or config.batch_size // processes
    steps = ceil(pairs * config.epochs / config.batch_size)
    n = shape.trunk + shape.width
    batches = config.batch_size / processes / micro
    step: Work = [
        (batches, forward(shape, shape.layers, 2 * micro, length, computes, "weights")),
        (1, adam(n)),
        small(TRAINER_STEP),
    ]
    low = 2.0 * n if computes != dtype else 0.0
    heldout = config.pairs.heldout / micro / processes
    gradients = 4.0 * n * (2 if processes > 1 else 1)
    return Estimate(
        "train-reward",
        processes,
        computes,
        {"language model": shape.parameters, "trained": n},
        {
            "reward model": SIZE[dtype] * n,
            "gradients": gradients,
            "optimiser": 8.0 * n,
        },
        [
            Phase("start", 1, [(1, start("rl")), (1, start("command")), small(PHASE)]),
            Phase(
                "steps",
                steps,
                step,
                {
                    "activations": 2 * micro * length * shape.layers * SAVED["weights"] * shape.width * SIZE[computes],
                    "weights for autocast": low,
                },
            ),
            Phase("held-out pairs", 1, [(heldout, forward(shape, shape.layers, 2 * micro, length, computes))]),
        ],
        {"model": 4.0 * n, "checkpoint": 12.0 * n},
        notes,
    )


def number_of_pairs(config: TrainRewardConfig) -> tuple[int, list[str]]:
    """Training pairs, and what was assumed; those of a file are counted where it is there."""
    from saerl_cli.data.pairs import read_pairs

    pairs = config.pairs
    if pairs.kind is PairsKind.planted:
        return pairs.count or PLANTED_PAIRS, []
    if pairs.count is not None:
        return pairs.count, []
    try:
        return len(read_pairs(pairs, config.model, "train")), []
    except ValueError:
        return 100_000, [f"{pairs.path} is not there: taken to hold 100,000 pairs (pairs.count says otherwise)"]
