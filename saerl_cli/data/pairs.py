"""Preference pairs: two continuations of one prompt, of which one is preferred. Imports no torch."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from saerl_cli.config.groups import ModelConfig
from saerl_cli.config.pairs import PairsConfig, PairsKind
from saerl_cli.data.rows import Row, column, read_rows
from saerl_cli.planted.documents import planted_pairs

TURN = "\n\nAssistant:"
"""What stands before every reply of a transcript."""


@dataclass(frozen=True)
class Pair:
    """Two continuations of a prompt."""

    prompt: str
    chosen: str
    """The preferred continuation, without the prompt and without an end token; it follows the prompt as it stands."""
    rejected: str


def read_pairs(config: PairsConfig, model: ModelConfig, split: str, left_out: Counter[str] | None = None) -> list[Pair]:
    """Read the pairs of a split, in a fixed order.

    Args:
        config: which pairs.
        model: of whose language planted pairs are.
        split: `train` or `heldout`.
        left_out: how many pairs of the file were left out is added here, by reason.

    Raises:
        ValueError: a missing or malformed file, an unknown attribute, or too few pairs.
    """
    if config.kind is PairsKind.planted:
        return [Pair(*pair) for pair in planted_pairs(config, model, split)]
    pairs = list(file_pairs(config.path or "", Counter() if left_out is None else left_out))
    if len(pairs) <= config.heldout:
        raise ValueError(
            f"pairs.path={config.path} holds {len(pairs)} usable pairs, of which pairs.heldout={config.heldout} are"
            " kept from training; lower it"
        )
    return pairs[-config.heldout :] if split == "heldout" else pairs[: -config.heldout][: config.count]


def file_pairs(path: str, left_out: Counter[str]) -> Iterator[Pair]:
    """Read the usable pairs of a file; why others are not is counted in `left_out`."""
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
    """Read a row as a pair; None for transcripts that differ before their last reply.

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
