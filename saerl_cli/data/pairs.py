"""Preference pairs: two continuations of one prompt, of which one is preferred. Imports no torch.

Planted pairs are reviews of the planted language as it writes them: two that begin with the same words and differ in
how many of the words behind them carry an attribute. Both are what the language says after that prompt, so that nothing
but the attribute and chance tells them apart.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from saerl_cli.config.groups import ModelConfig, ModelKind
from saerl_cli.config.pairs import PairsConfig, PairsKind, Prefer
from saerl_cli.data.rows import Row, column, read_rows
from saerl_cli.planted.language import ATTRIBUTES, join_words, labels_of, reviews

STARTS = {"train": 2_000_000_000, "heldout": 3_000_000_000}
"""Number of the first review that planted pairs of a split are looked for in, beyond those a model is trained on."""
PLANTED_PAIRS = 2000
"""Training pairs where the settings leave it open."""
TURN = "\n\nAssistant:"
"""What stands before every reply of a transcript."""


@dataclass(frozen=True)
class Pair:
    """Two continuations of a prompt."""

    prompt: str
    chosen: str
    """The preferred continuation, without the prompt and without an end token; it follows the prompt as it stands."""
    rejected: str


def read_pairs(config: PairsConfig, model: ModelConfig, split: str) -> list[Pair]:
    """The pairs of a split, in a fixed order.

    Args:
        config: which pairs.
        model: of whose language planted pairs are.
        split: `train` or `heldout`.

    Raises:
        ValueError: a missing or malformed file, an unknown attribute, or too few pairs.
    """
    return read_pairs_with_counts(config, model, split)[0]


def read_pairs_with_counts(config: PairsConfig, model: ModelConfig, split: str) -> tuple[list[Pair], Counter[str]]:
    """As `read_pairs`, with how many pairs of the file were left out, by reason."""
    if split not in STARTS:
        raise ValueError(f'split must be "train" or "heldout", got {split!r}')
    if config.kind is PairsKind.planted:
        return planted_pairs(config, model, split), Counter()
    left_out: Counter[str] = Counter()
    pairs = list(file_pairs(config.path or "", left_out))
    if len(pairs) <= config.heldout:
        raise ValueError(
            f"pairs.path={config.path} holds {len(pairs)} usable pairs, of which pairs.heldout={config.heldout} are"
            " kept from training; lower it"
        )
    return pairs[-config.heldout :] if split == "heldout" else pairs[: -config.heldout][: config.count], left_out


# --- of the planted language ----------------------------------------------------------------------------------------


def planted_pairs(config: PairsConfig, model: ModelConfig, split: str) -> list[Pair]:
    """Pairs of reviews with the same beginning and another number of words that carry the attribute."""
    if model.kind is not ModelKind.planted:
        raise ValueError("pairs.kind=planted belongs to model=planted; write pairs.kind=file pairs.path=FILE")
    if config.attribute not in ATTRIBUTES:
        raise ValueError(f"pairs.attribute={config.attribute!r} is unknown; there are {', '.join(sorted(ATTRIBUTES))}")
    wanted = config.heldout if split == "heldout" else config.count or PLANTED_PAIRS
    pairs = list(islice(matched_reviews(config, STARTS[split], 100 * wanted + 10_000), wanted))
    if len(pairs) < wanted:
        raise ValueError(
            f"only {len(pairs)} pairs of reviews begin with the same pairs.prompt_tokens={config.prompt_tokens} words"
            f" and differ in {config.attribute}, {wanted} are asked for; lower either number"
        )
    return pairs


def matched_reviews(config: PairsConfig, start: int, limit: int) -> Iterator[Pair]:
    """Pairs found among `limit` reviews; every review is in one pair at most."""
    waiting: dict[tuple[str, ...], dict[int, str]] = {}  # prompt -> words with the attribute -> continuation
    for review in islice(reviews(config.seed, start), limit):
        head, rest = tuple(review.words[: config.prompt_tokens]), review.words[config.prompt_tokens :]
        if not rest:
            continue
        labels = labels_of(review.words)[len(head) :]
        count = sum(config.attribute in of_word for of_word in labels)
        others = waiting.setdefault(head, {})
        other = next((number for number in others if number != count), None)
        if other is None:
            others.setdefault(count, continuation(rest))
            continue
        less, more = sorted([(count, continuation(rest)), (other, others.pop(other))])
        chosen, rejected = (less, more) if config.prefer is Prefer.less else (more, less)
        yield Pair(join_words(head), chosen[1], rejected[1])


def continuation(words: list[str]) -> str:
    """Words as they follow others: with a space before them, unless they begin with punctuation."""
    text = join_words(words)
    return text if text[0] in ".,!?" else f" {text}"


# --- of a file -------------------------------------------------------------------------------------------------------


def file_pairs(path: str, left_out: Counter[str]) -> Iterator[Pair]:
    """The usable pairs of a file; why others are not is counted in `left_out`."""
    for row in read_rows(path, "pairs.path"):
        pair = row_pair(row)
        if pair is None:
            left_out["the two sides do not share their prompt"] += 1
        elif not pair.chosen.strip() or not pair.rejected.strip():
            left_out["a reply is empty"] += 1
        elif pair.chosen == pair.rejected:
            left_out["both replies are the same"] += 1
        else:
            yield pair


def row_pair(row: Row) -> Pair | None:
    """A row as a pair; None for transcripts that differ before their last reply.

    Raises:
        ValueError: a missing column, or transcripts without a reply.
    """
    need = "pairs.path needs rows of prompt, chosen and rejected, or of chosen and rejected transcripts"
    chosen, rejected = column(row, "chosen", need), column(row, "rejected", need)
    if "prompt" in row[1]:
        return Pair(column(row, "prompt", need), chosen, rejected)
    if TURN not in chosen or TURN not in rejected:
        raise ValueError(f"{row[0]} has no 'prompt' and no {TURN.strip()!r} in its texts; {need}")
    (prompt, _, reply), (other, _, other_reply) = chosen.rpartition(TURN), rejected.rpartition(TURN)
    return Pair(prompt + TURN, reply, other_reply) if prompt == other else None
