"""The sequences that sft and dpo learn from: how many, and how long, as far as that is known before they are tokens."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path

from saerl_cli.config.groups import DataConfig, DataKind, ModelConfig, ModelKind
from saerl_cli.config.pairs import PairsConfig, PairsKind
from saerl_cli.config.rlhf import RlhfConfig
from saerl_cli.data.documents import row_length
from saerl_cli.data.examples import read_examples, split_examples
from saerl_cli.data.pairs import Pair, read_pairs
from saerl_cli.plan.work import Work, piece
from saerl_cli.planted.documents import PLANTED_PAIRS

SAMPLE = 256
"""Pairs or examples from which lengths are taken."""
CHARACTERS = 4
"""Of a token where there is no tokenizer to ask."""
REVIEW_TOKENS = 32
"""Of a review of the planted language, its separator included (measured)."""
UNKNOWN_PAIRS = 100_000
"""Pairs of a file that is not there."""


@dataclass(frozen=True)
class Examples:
    """Training sequences, and how many held-out ones; lengths in tokens. The two sides of a pair are two sequences."""

    sequences: float
    heldout: float
    mean: float
    """Length of a sequence."""
    padded: float
    """Length of a micro-batch: that of its longest sequence, on average."""
    longest: float
    reading: Work
    """Making them."""
    notes: list[str]


def documents_packed(config: RlhfConfig, context: int) -> Examples:
    """Rows of the documents of `data`, or of those that carry an attribute, packed (sft)."""
    data, length = config.data, row_length(config.data, context)
    tokens, reading, notes = tokens_of(data, config.model)
    if config.algo.attribute is not None:
        notes.append("as many documents are counted as if all carried algo.attribute")
    train, heldout = (tokens * share / length for share in (1 - data.heldout, data.heldout))
    if data.kind is DataKind.planted:  # whose held-out documents come on top
        train, heldout = tokens / length, max(1.0, data.heldout * tokens / length)
    return Examples(train, heldout, length, length, length, reading, notes)


def tokens_of(data: DataConfig, model: ModelConfig) -> tuple[float, Work, list[str]]:
    """Tokens of a text, the work of making packed rows of them, and what was assumed."""
    if data.kind is DataKind.planted:
        count = min(data.max_documents or model.planted.documents, model.planted.documents)
        return count * REVIEW_TOKENS, [((1 + data.heldout) * count / 1000, piece("reviews", 0, 0, 15_000))], []
    files = [Path(name) for name in glob(data.path or "", recursive=True)] if data.kind is DataKind.text else []
    size = sum(file.stat().st_size for file in files)
    if not size:
        return 0.0, [], ["memory and time of making rows of text that is not here are not counted"]
    tokenizer = str(model.path) if model.kind is ModelKind.local else ""
    return size / CHARACTERS, [(size / 2**20, piece("tokenize", 0, 0, 100_000, tokenizer=tokenizer))], []


def examples_of_file(config: RlhfConfig, context: int, micro: int) -> Examples:
    """Prompts with their completions (sft).

    Args:
        config: `algo.examples` names the file.
        context: tokens that the model can read; longer sequences are left out.
        micro: sequences of a micro-batch.

    Raises:
        ValueError: a file that cannot be read.
    """
    train, heldout = split_examples(read_examples(config.algo.examples or ""), config.data.heldout)
    count, notes = token_counter(config.model)
    lengths = [count(one.prompt) + count(one.completion) + 1 for one in train[:SAMPLE]]
    return from_lengths(lengths, context, micro, len(train), len(heldout), [], notes)


def pairs(config: PairsConfig, model: ModelConfig, context: int, micro: int) -> Examples:
    """The two sides of preference pairs, padded to one length (dpo).

    Args:
        config: which pairs.
        model: whose they are.
        context: tokens that the model can read.
        micro: pairs of a micro-batch.

    Raises:
        ValueError: pairs that cannot be read.
    """
    count, notes = token_counter(model)

    def length(pair: Pair) -> int:
        return count(pair.prompt) + max(count(pair.chosen), count(pair.rejected)) + 1

    if config.kind is PairsKind.planted:
        number = config.count or PLANTED_PAIRS
        found = read_pairs(replace(config, count=min(number, SAMPLE)), model, "train")
        reading: Work = [((number + config.heldout) / 100, piece("pairs", 0, 0, 50_000))]
    elif glob(config.path or "", recursive=True):
        found, reading = read_pairs(config, model, "train"), []
        number = len(found)
    else:
        number = config.count or UNKNOWN_PAIRS
        notes = [f"{config.path} is not there: taken to hold {number:,} pairs of {context} tokens a side"]
        return Examples(2.0 * number, 2.0 * config.heldout, context, context, context, [], notes)
    return from_lengths(map(length, found[:SAMPLE]), context, micro, number, config.heldout, reading, notes, sides=2)


def from_lengths(
    lengths: Iterable[int],
    context: int,
    rows: int,
    number: int,
    heldout: int,
    reading: Work,
    notes: list[str],
    sides: int = 1,
) -> Examples:
    """Sequences, or pairs with two `sides`, of which some lengths are known.

    Args:
        lengths: tokens of some.
        context: tokens that the model can read; longer ones are left out.
        rows: of a micro-batch.
        number: how many there are for training.
        heldout: and to measure.
        reading: the work of making them.
        notes: what was assumed.
        sides: sequences of each.
    """
    fitting = [length for length in lengths if length <= context] or [context]
    longest = [max(fitting[first : first + rows]) for first in range(0, len(fitting), rows)]
    return Examples(
        sequences=sides * number,
        heldout=sides * heldout,
        mean=sum(fitting) / len(fitting),
        padded=sum(longest) / len(longest),
        longest=max(fitting),
        reading=reading,
        notes=notes,
    )


def token_counter(model: ModelConfig) -> tuple[Callable[[str], int], list[str]]:
    """How many tokens a text has, by the model's tokenizer where it is here, and what was assumed."""
    from saerl_cli.models import light_tokenizer
    from saerl_cli.planted.language import split_words

    if model.kind is ModelKind.planted:
        return lambda text: len(split_words(text)), []
    tokenizer = light_tokenizer(Path(model.path or "")) if model.kind is ModelKind.local else None
    if tokenizer is not None:
        return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids), []
    return lambda text: -(-len(text) // CHARACTERS), [f"a token is taken to have {CHARACTERS} characters"]
