"""Documents packed into rows of tokens, held in memory or made as they are needed."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor

from saerl_cli.config.groups import DataConfig, DataKind
from saerl_cli.data.documents import Counts, refuse_all_heldout, stream_documents
from saerl_cli.data.text import BEGINNING, Place, text_files
from saerl_cli.models import separator_id

DOCUMENTS_AT_ONCE = 256
"""Documents tokenized together in a stream."""
Cursor = dict[str, Any]
"""Where reading goes on: plain data for a checkpoint."""


def encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each text, without special tokens; rows are cut here, so its length warnings are off."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def token_rows(texts: Sequence[str], tokenizer: Any, context_size: int) -> Tensor:
    """Documents packed into rows of token ids, [rows, context_size].

    Raises:
        ValueError: there is no text.
    """
    return pack(encode(texts, tokenizer), separator_id(tokenizer), context_size)


def pack(encoded: Iterable[Sequence[int]], separator: int, context_size: int) -> Tensor:
    """Lay documents end to end, a separator after each, in rows that start where a document starts.

    A document that the end of a row cuts begins the next row anew, so that what follows is read in its whole context;
    one longer than a row goes on where it was cut. Every row starts with a separator: models park attention on the
    first position of a context, whatever is there, and so that odd vector belongs to a token that is masked. The last
    row is filled up with separators.

    Returns:
        Token ids, [rows, context_size].

    Raises:
        ValueError: there is nothing to pack.
    """
    packer = Packer(separator, context_size)
    rows = [row for document in encoded for row in packer.add(document)]
    rows += packer.flush()
    if not rows:
        raise ValueError("the text has no tokens")
    return torch.tensor(rows)


class Packer:
    """`pack`, a document at a time.

    Args:
        separator: token between documents.
        context_size: tokens a row.
        row: the unfinished row, without its first separator.
    """

    def __init__(self, separator: int, context_size: int, row: Sequence[int] = ()):
        self.separator, self.body, self.row = separator, context_size - 1, list(row)

    def add(self, document: Sequence[int]) -> list[list[int]]:
        """The rows that a document completes."""
        rows, rest = [], [*document, self.separator] if len(document) else []
        while rest:
            taken = rest[: self.body - len(self.row)]
            self.row += taken
            if len(self.row) == self.body:
                rows.append([self.separator, *self.row])
                self.row = []
            if len(taken) == len(rest) or len(rest) > self.body:
                rest = rest[len(taken) :]
        return rows

    def flush(self) -> list[list[int]]:
        """The unfinished row filled up with separators, or nothing."""
        if not self.row:
            return []
        row = [self.separator, *self.row, *[self.separator] * (self.body - len(self.row))]
        self.row = []
        return [row]


def special_ids(tokenizer: Any) -> list[int]:
    """Tokens that are no text (pad, bos, eos, separators): left out of training and of every metric."""
    return sorted({*tokenizer.all_special_ids, separator_id(tokenizer)})


def text_mask(rows: Tensor, special: Sequence[int]) -> Tensor:
    """True where a token is text: [rows, context_size], bool."""
    return ~torch.isin(rows, torch.tensor(special, device=rows.device))


# --- where a stream takes its rows from ------------------------------------------------------------------------------


class MemoryRows:
    """Rows held in memory, in an order reshuffled every epoch.

    Args:
        rows: token ids, [rows, context_size].
        special: token ids that are no text.
        seed: of the order.

    Attributes:
        start: the cursor of the first row.
    """

    start: Cursor = {"epoch": 0, "row": 0}

    def __init__(self, rows: Tensor, special: Sequence[int], seed: int = 0):
        self.rows, self.special, self.seed = rows, special, seed
        self.context_size = rows.shape[1]
        self.lengths = text_mask(rows, special).sum(1)  # tokens of text in each row
        self._order: tuple[int, Tensor] | None = None

    def head(self, tokens: int) -> Tensor:
        """The first rows in the order of the text, as many as hold `tokens` tokens of text, or all."""
        return self.rows[: rows_holding(self.lengths, tokens)]

    def take(self, cursor: Cursor, tokens: int) -> tuple[Tensor, Cursor]:
        """The rows from a cursor on that hold `tokens` tokens of text, and the cursor behind them."""
        epoch, first, parts = cursor["epoch"], cursor["row"], []
        while True:
            order = self._epoch_order(epoch)[first:]
            number = rows_holding(self.lengths[order], tokens)
            parts.append(order[:number])
            tokens -= int(self.lengths[parts[-1]].sum())
            if tokens <= 0:
                return self.rows[torch.cat(parts)], {"epoch": epoch, "row": first + number}
            epoch, first = epoch + 1, 0

    def _epoch_order(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            order = torch.randperm(len(self.rows), generator=seeded(self.seed, 0, epoch))
            self._order = (epoch, order)
        return self._order[1]


class StreamedRows:
    """Rows of documents that are read, tokenized and packed when they are needed, epoch after epoch in the same order.

    The first `data.heldout_documents` documents are left out. With several processes each tokenizes everything. The
    files are looked up once, and a cursor belongs to them.

    Args:
        data: which text.
        tokenizer: of the model.
        context_size: tokens a row.
        special: token ids that are no text.

    Attributes:
        start: the cursor of the first row.
        counts: what reading has met so far.
    """

    def __init__(self, data: DataConfig, tokenizer: Any, context_size: int, special: Sequence[int]):
        self.data, self.tokenizer, self.context_size, self.special = data, tokenizer, context_size, special
        self.separator, self._special = separator_id(tokenizer), frozenset(special)
        self.counts = Counts()
        self.files = [] if data.kind is DataKind.hub else text_files(data)
        source = [data.name, data.subset, data.split, [[path.name, path.stat().st_size] for path in self.files]]
        self.start: Cursor = {
            "source": hashlib.sha256(json.dumps(source).encode()).hexdigest()[:16],
            "epoch": 0,
            "place": list(astuple(BEGINNING)),
            "unfinished": [],
            "used": 0,
        }
        self._reading: tuple[Cursor, Iterator[tuple[list[int], Cursor]]] | None = None

    def head(self, tokens: int) -> Tensor:
        """The first rows of the text, as many as hold `tokens` tokens of text, or all.

        Raises:
            ValueError: there are none.
        """
        chosen = []
        for row, _ in self._epoch(self.start, Counts()):
            chosen.append(row)
            tokens -= self._length(row)
            if tokens <= 0:
                break
        return torch.tensor(chosen)

    def take(self, cursor: Cursor, tokens: int) -> tuple[Tensor, Cursor]:
        """The rows from a cursor on that hold `tokens` tokens of text, and the cursor behind them."""
        if cursor.get("source") != self.start["source"]:
            raise ValueError(f"{self.data.path or self.data.name} is not the text that this stream was reading")
        if self._reading is None or self._reading[0] != cursor:
            self._reading = (cursor, self._endless(cursor))
        reader, chosen = self._reading[1], []
        self._reading = None  # an error ends a generator, and nothing may be left out after one
        while tokens > 0:
            row, cursor = next(reader)
            chosen.append(row)
            tokens -= self._length(row)
        self._reading = (cursor, reader)
        return torch.tensor(chosen), cursor

    def _length(self, row: list[int]) -> int:
        return sum(token not in self._special for token in row)

    def _endless(self, cursor: Cursor) -> Iterator[tuple[list[int], Cursor]]:
        yield from self._epoch(cursor, self.counts)
        for epoch in count(cursor["epoch"] + 1):
            yield from self._epoch(self.start | {"epoch": epoch}, self.counts)

    def _epoch(self, cursor: Cursor, counts: Counts) -> Iterator[tuple[list[int], Cursor]]:
        """The rows of an epoch behind a cursor, each with the cursor behind it."""
        epoch, place, used = cursor["epoch"], Place(*cursor["place"]), cursor["used"]
        packer, empty = Packer(self.separator, self.context_size, cursor["unfinished"]), place == BEGINNING
        for before, document in self._encoded(place, counts):
            here = self.start | {"epoch": epoch, "place": list(astuple(before)), "unfinished": packer.row[:]}
            for number, row in enumerate(packer.add(document), start=1):
                empty = False
                if number > used:
                    yield row, here | {"used": number}
            used = 0
        for row in packer.flush():
            empty = False
            yield row, self.start | {"epoch": epoch + 1}
        if empty:  # it would be read for ever
            refuse_all_heldout(sum(1 for _ in stream_documents(self.data)), self.data)
            raise ValueError("the text has no tokens")

    def _encoded(self, place: Place, counts: Counts) -> Iterator[tuple[Place, list[int]]]:
        """Token ids of each training document behind a place, and the place before it."""
        reader = stream_documents(self.data, place, counts, self.files)
        training = ((text, after) for text, after in reader if after.document > self.data.heldout_documents)
        while group := list(islice(training, DOCUMENTS_AT_ONCE)):
            for ids, (_, after) in zip(encode([text for text, _ in group], self.tokenizer), group, strict=True):
                yield place, ids
                place = after


def rows_holding(lengths: Tensor, tokens: int) -> int:
    """How many rows, from the first, hold `tokens` tokens; all where there are not so many."""
    return min(len(lengths), int(torch.searchsorted(lengths.cumsum(0), tokens)) + 1)


def seeded(seed: int, purpose: int, index: int) -> torch.Generator:
    """Randomness of the order of epoch (purpose 0) or buffer (purpose 1) number `index`."""
    return torch.Generator().manual_seed(((seed * 2 + purpose) * 1_000_003 + index) % 2**63)
