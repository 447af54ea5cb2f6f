"""Which documents are read, and which of them are held out. Imports no torch: checks before a run call it."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from saerl_cli.config.groups import DataConfig, DataKind, ModelConfig, ModelKind
from saerl_cli.data.text import (
    BEGINNING,
    Counts,
    Place,
    Record,
    keep,
    read_documents,
    read_files,
    refuse_all_heldout,
    split_documents,
    text_files,
    text_of,
)

LONGEST_CONTEXT = 512
"""Tokens a row where the settings leave it open and the model could read more."""


def documents(data: DataConfig, model: ModelConfig, split: str) -> list[str]:
    """The texts of a split: `heldout`, or `train` with all the rest.

    Held out is the share `data.heldout` of the documents, from the end; with `data.stream`, the first
    `data.heldout_documents`. All training text is then in memory: `iter_documents` reads it lazily.

    Args:
        data: which text.
        model: the planted language's settings, for `data=planted`.
        split: `train` or `heldout`.

    Raises:
        ValueError: missing, empty or malformed text, naming file and line.
    """
    return documents_with_counts(data, model, split)[0]


def documents_with_counts(data: DataConfig, model: ModelConfig, split: str) -> tuple[list[str], Counts]:
    """As `documents`, with what was left out on the way; `counts.note()` says it in words."""
    counts = Counts()
    if data.kind is DataKind.planted:
        return [review.text for review in planted_reviews(data, model, split)], counts
    if data.stream:
        return list(streamed_texts(data, split, counts)), counts
    texts = hub_documents(data, counts) if data.kind is DataKind.hub else read_documents(data, counts)
    train, heldout = split_documents(texts, data)
    return (heldout if split == "heldout" else train), counts


def iter_documents(data: DataConfig, model: ModelConfig, split: str) -> Iterator[str]:
    """As `documents`, read lazily with `data.stream`."""
    return streamed_texts(data, split) if data.stream else iter(documents(data, model, split))


def streamed_texts(data: DataConfig, split: str, counts: Counts | None = None) -> Iterator[str]:
    """A split of streamed text.

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


def stream_documents(
    data: DataConfig,
    start: Place = BEGINNING,
    counts: Counts | None = None,
    files: Iterable[Path] | None = None,
) -> Iterator[tuple[str, Place]]:
    """Every document behind `start`, held-out ones too, each with the place behind it.

    Args:
        data: which text.
        start: where to go on; what lies before is passed over without being parsed.
        counts: what is left out is added here.
        files: those of `data.path`, looked up earlier.
    """
    if data.kind is DataKind.hub:
        records = hub_records(data, start)
    else:
        records = read_files(text_files(data) if files is None else files, data.field, start)
    return keep(records, data, start, counts)


def planted_reviews(data: DataConfig, model: ModelConfig, split: str) -> list[Any]:
    """The labelled documents behind `documents` for `data=planted`, in the same order."""
    from saerl_cli.planted.cache import planted_documents

    if model.kind is not ModelKind.planted:
        raise ValueError("data=planted belongs to model=planted; write data=text data.path=FILE for another model")
    number = min(data.max_documents or model.planted.documents, model.planted.documents)
    if split == "heldout":
        number = max(1, round(number * data.heldout))
    return list(islice(planted_documents(model.planted, split), number))


def hub_documents(data: DataConfig, counts: Counts | None = None) -> list[str]:
    """The documents of a Hub data set, at most `data.max_documents`.

    Raises:
        ValueError: no network, no such data set or column, or no text.
    """
    found = [text for text, _ in keep(hub_records(data, BEGINNING), data, counts=counts)]
    if not found:
        raise ValueError(f"data.name={data.name} holds no text in {data.field!r}")
    return found


def hub_records(data: DataConfig, start: Place) -> Iterator[Record]:
    """The rows of a Hub data set behind `start`."""
    for number, row in enumerate(hub_rows(data, start.record), start=start.record + 1):
        yield text_of(row, data.field, f"{data.name} row {number}"), Place(record=number)


def hub_rows(data: DataConfig, skip: int) -> Iterator[Any]:
    """Rows of a Hub data set; not downloaded whole with `data.stream` or `data.max_documents`."""
    import datasets

    lazy = data.stream or data.max_documents is not None
    try:
        table = datasets.load_dataset(str(data.name), data.subset, split=data.split, streaming=lazy)
        yield from table.skip(skip) if skip else table
    except Exception as error:  # network, name, configuration and format errors share no base class
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read data.name={data.name}: {line}; data=text data.path=FILE works offline") from None


def row_length(data: DataConfig, model_context: int) -> int:
    """Tokens a row: `data.context_size`, or the model's context, at most `LONGEST_CONTEXT`.

    Raises:
        ValueError: the settings ask for more than the model can read.
    """
    if data.context_size is not None and data.context_size > model_context:
        raise ValueError(f"data.context_size={data.context_size} exceeds the model's context of {model_context} tokens")
    return data.context_size or min(model_context, LONGEST_CONTEXT)
