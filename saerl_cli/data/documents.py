"""Which documents are read, and which of them are held out. Imports no torch: checks before a run call it.

Empty documents and those that are not UTF-8 are left out and counted (`Counts`).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from saerl_cli.config.groups import DataConfig, DataKind, ModelConfig
from saerl_cli.data.text import BEGINNING, Place, Record, read_files, text_files, text_of
from saerl_cli.planted.documents import planted_reviews

LONGEST_CONTEXT = 512
"""Tokens a row where the settings leave it open and the model could read more."""


@dataclass
class Counts:
    """What a reader has met so far."""

    documents: int = 0
    """Documents given."""
    skipped_empty: int = 0
    """Lines and documents without text."""
    skipped_encoding: int = 0
    """Lines and documents that are not UTF-8."""

    def note(self) -> str:
        """What was left out, in words; empty when nothing was."""
        skipped = {"empty": self.skipped_empty, "not UTF-8": self.skipped_encoding}
        found = [f"{number} {kind}" for kind, number in skipped.items() if number]
        return f"left out lines or documents of the text: {', '.join(found)}" if found else ""


def documents(data: DataConfig, model: ModelConfig, split: str, counts: Counts | None = None) -> list[str]:
    """Read the texts of a split: `heldout`, or `train` with all the rest.

    Held out is the share `data.heldout` of the documents, from the end; with `data.stream`, the first
    `data.heldout_documents`. All training text is then in memory: `iter_documents` reads it lazily.

    Args:
        data: which text.
        model: the planted language's settings, for `data=planted`.
        split: `train` or `heldout`.
        counts: what was left out is added here; `counts.note()` says it in words.

    Raises:
        ValueError: missing, empty or malformed text, naming file and line.
    """
    return list(iter_documents(data, model, split, counts))


def iter_documents(data: DataConfig, model: ModelConfig, split: str, counts: Counts | None = None) -> Iterator[str]:
    """Read the same one by one, the planted language and `data.stream` as far as they are asked for."""
    if data.kind is DataKind.planted:
        return (review.text for review in planted_reviews(data, model, split))
    if data.stream:
        return streamed_texts(data, split, counts)
    train, heldout = split_documents(read_documents(data, counts), data)
    return iter(heldout if split == "heldout" else train)


def read_documents(data: DataConfig, counts: Counts | None = None) -> list[str]:
    """Read all documents of files, in the order of their names, or of a Hub data set; at most `data.max_documents`.

    Args:
        data: which text.
        counts: what was left out is added here.

    Raises:
        ValueError: no such file or data set, no network, a malformed line (named), or no text at all.
    """
    counts = counts or Counts()
    found = [text for text, _ in stream_documents(data, counts=counts)]
    if not found and data.kind is DataKind.hub:
        raise ValueError(f"data.name={data.name} holds no text in {data.field!r}")
    if not found:
        note = counts.note()
        raise ValueError(f"data.path={data.path} holds no text" + (f"; {note}" if note else ""))
    return found


def split_documents(documents: list[str], data: DataConfig) -> tuple[list[str], list[str]]:
    """Split into training and held-out documents, as `documents` says.

    Raises:
        ValueError: nothing would be left for training.
    """
    if data.stream:
        refuse_all_heldout(len(documents), data)
        return documents[data.heldout_documents :], documents[: data.heldout_documents]
    if len(documents) < 2:
        raise ValueError(f"data.path={data.path} holds one document; training and held-out text need two or more")
    training = len(documents) - max(1, round(data.heldout * len(documents)))
    return documents[:training], documents[training:]


def row_length(data: DataConfig, model_context: int) -> int:
    """Choose the tokens of a row: `data.context_size`, or the model's context, at most `LONGEST_CONTEXT`.

    Raises:
        ValueError: the settings ask for more than the model can read.
    """
    if data.context_size is not None and data.context_size > model_context:
        raise ValueError(f"data.context_size={data.context_size} exceeds the model's context of {model_context} tokens")
    return data.context_size or min(model_context, LONGEST_CONTEXT)


# --- streams ---------------------------------------------------------------------------------------------------------


def streamed_texts(data: DataConfig, split: str, counts: Counts | None = None) -> Iterator[str]:
    """Read a split of streamed text.

    Raises:
        ValueError: no document is left for training.
    """
    texts = (text for text, _ in stream_documents(data, counts=counts))
    heldout = list(islice(texts, data.heldout_documents))
    first = next(texts, None)
    if first is None:
        refuse_all_heldout(len(heldout), data)
    if split == "heldout":
        yield from heldout
    else:
        yield first or ""
        yield from texts


def refuse_all_heldout(documents: int, data: DataConfig) -> None:
    """Refuse a stream of so many documents that leaves none for training."""
    if documents <= data.heldout_documents:
        raise ValueError(
            f"{data.path or data.name} holds {documents} documents, and data.stream keeps the first"
            f" data.heldout_documents={data.heldout_documents} from training; lower it"
        )


def stream_documents(
    data: DataConfig,
    start: Place = BEGINNING,
    counts: Counts | None = None,
    files: Iterable[Path] | None = None,
) -> Iterator[tuple[str, Place]]:
    """Read every document behind `start`, held-out ones too, each with the place behind it.

    Ends after document number `data.max_documents`, those before `start` included.

    Args:
        data: which text.
        start: where to go on; what lies before is passed over without being parsed.
        counts: what is left out is added here.
        files: those of `data.path`, looked up earlier.
    """
    counts, number = counts or Counts(), start.document
    if number == data.max_documents:
        return
    if data.kind is DataKind.hub:
        records = hub_records(data, start)
    else:
        records = read_files(text_files(data) if files is None else files, data.field, start)
    for text, place in records:
        if text is None or not encodable(text):
            counts.skipped_encoding += 1
        elif not text.strip():
            counts.skipped_empty += 1
        else:
            number += 1
            counts.documents += 1
            yield text, Place(place.file, place.offset, place.record, number)
            if number == data.max_documents:
                return


def encodable(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON can smuggle in halves of surrogate pairs."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def hub_records(data: DataConfig, start: Place) -> Iterator[Record]:
    """Read the rows of a Hub data set behind `start`."""
    for number, row in enumerate(hub_rows(data, start.record), start=start.record + 1):
        yield text_of(row, data.field, f"{data.name} row {number}"), Place(record=number)


def hub_rows(data: DataConfig, skip: int) -> Iterator[Any]:
    """Load rows of a Hub data set; not downloaded whole with `data.stream` or `data.max_documents`."""
    import datasets

    lazy = data.stream or data.max_documents is not None
    try:
        table = datasets.load_dataset(str(data.name), data.subset, split=data.split, streaming=lazy)
        yield from table.skip(skip) if skip else table
    except Exception as error:  # network, name, configuration and format errors share no base class
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read data.name={data.name}: {line}; data=text data.path=FILE works offline") from None
