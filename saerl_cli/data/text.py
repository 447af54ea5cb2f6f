"""Documents from files: a txt with a document a line, JSON lines, a JSON list, or parquet; lines may be .gz or .zst.

Files are read lazily, a line or a parquet batch at a time (a JSON list is parsed whole), and a reader can go on where
another stood (`Place`). Empty documents and those that are not UTF-8 are left out and counted (`Counts`).
"""

import codecs
import glob
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saerl_cli.config.groups import DataConfig

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
COMPRESSED = (".gz", ".zst")
PARQUET_ROWS = 1024
"""Rows of parquet held at once."""
UNREADABLE = object()


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


@dataclass(frozen=True)
class Place:
    """How far a reader has come; reading can go on from here without what lies before."""

    file: int = 0
    """Index among the files of `text_files`."""
    offset: int = 0
    """Bytes read of it, uncompressed; 0 where a file is not read by lines."""
    record: int = 0
    """Lines, rows or items read of it."""
    document: int = 0
    """Documents given, over all files."""


BEGINNING = Place()
Record = tuple[str | None, Place]
"""A text (None where it is not UTF-8, "" where there is none) and the place behind it, `document` not yet set."""


def read_documents(data: DataConfig, counts: Counts | None = None) -> list[str]:
    """The documents of `data.path`, files in the order of their names, at most `data.max_documents`.

    Args:
        data: which text.
        counts: what was left out is added here.

    Raises:
        ValueError: no such file, another kind of file, a malformed line (named), or no text at all.
    """
    counts = counts or Counts()
    found = [text for text, _ in keep(read_files(text_files(data), data.field), data, counts=counts)]
    if not found:
        note = counts.note()
        raise ValueError(f"data.path={data.path} holds no text" + (f"; {note}" if note else ""))
    return found


def keep(
    records: Iterable[Record], data: DataConfig, start: Place = BEGINNING, counts: Counts | None = None
) -> Iterator[tuple[str, Place]]:
    """The usable documents among records from `start` on, each with the place behind it.

    Ends after document number `data.max_documents`, those before `start` included.
    """
    counts = counts or Counts()
    number = start.document
    if number == data.max_documents:
        return
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


def split_documents(documents: list[str], data: DataConfig) -> tuple[list[str], list[str]]:
    """Training and held-out documents.

    Held out is the share `data.heldout`, at least one, from the end; with `data.stream`, the first
    `data.heldout_documents`.

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


def refuse_all_heldout(documents: int, data: DataConfig) -> None:
    """`ValueError` when a stream of so many documents leaves none for training."""
    if documents <= data.heldout_documents:
        raise ValueError(
            f"{data.path or data.name} holds {documents} documents, and data.stream keeps the first"
            f" data.heldout_documents={data.heldout_documents} from training; lower it"
        )


# --- files -----------------------------------------------------------------------------------------------------------


def text_files(data: DataConfig) -> list[Path]:
    """The files that `data.path` names, sorted."""
    return named_files(data.path or "", "data.path", SUFFIXES)


def named_files(pattern: str, setting: str, suffixes: Sequence[str]) -> list[Path]:
    """The files that a path or glob names, sorted; all but parquet may be compressed.

    Args:
        pattern: path or glob.
        setting: what the user wrote it as, for messages.
        suffixes: the kinds allowed.

    Raises:
        ValueError: no such file, or one of another kind.
    """
    expanded = str(Path(pattern).expanduser())
    found = [expanded] if Path(expanded).exists() else sorted(glob.glob(expanded, recursive=True))
    if not found:
        raise ValueError(f"{setting}={pattern} does not exist; write {setting}=FILE or a glob in quotes")
    for path in map(Path, found):
        compressed_parquet = path.suffix in COMPRESSED and kind_of(path) == ".parquet"
        if not path.is_file() or kind_of(path) not in suffixes or compressed_parquet:
            raise ValueError(
                f"{setting}: {path} is not a {', '.join(suffixes)} file (text also as {' or '.join(COMPRESSED)})"
            )
    return [Path(path) for path in found]


def kind_of(path: Path) -> str:
    """`.jsonl` of both `a.jsonl` and `a.jsonl.gz`."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def read_files(paths: Iterable[Path], field: str, start: Place = BEGINNING) -> Iterator[Record]:
    """The records of files, from a place on.

    Raises:
        ValueError: a file that cannot be read (any more), or a malformed line, named.
    """
    for index, path in enumerate(paths):
        if index < start.file:
            continue
        skip = (start.offset, start.record) if index == start.file else (0, 0)
        try:
            for text, offset, record in read_file(path, field, *skip):
                yield text, Place(index, offset, record)
        except OSError as error:
            raise ValueError(f"cannot read {path}: {str(error).splitlines()[0]}") from None


def read_file(path: Path, field: str, offset: int, record: int) -> Iterator[tuple[str | None, int, int]]:
    """The texts of one file behind `offset` bytes and `record` records, with the counts behind each."""
    kind = kind_of(path)
    if kind in (".txt", ".jsonl"):
        yield from read_lines(path, field, offset, record)
    else:
        texts = read_parquet(path, field, record) if kind == ".parquet" else read_list(path, field, record)
        yield from ((text, 0, number) for number, text in enumerate(texts, start=record + 1))


def read_lines(path: Path, field: str, offset: int, record: int) -> Iterator[tuple[str | None, int, int]]:
    """As `read_file`, of a .txt or .jsonl file."""
    with opened(path) as file:
        file.seek(offset)
        for number, line in enumerate(file, start=record + 1):
            offset += len(line)
            yield line_text(line, kind_of(path), field, f"{path} line {number}"), offset, number


def opened(path: Path) -> io.BufferedIOBase:
    """A file's bytes, uncompressed."""
    if path.suffix in COMPRESSED:
        from pyarrow import input_stream

        return Unpacked(input_stream(str(path), compression={".gz": "gzip", ".zst": "zstd"}[path.suffix]))
    return path.open("rb")


class Unpacked(io.BufferedReader):
    """A compressed file, in which `seek` reads and drops what lies before."""

    def seek(self, target: int, whence: int = 0) -> int:
        """Go forward to a byte; only from the start of the file."""
        for _ in range(target // 2**20):
            self.read(2**20)
        self.read(target % 2**20)
        return target


def line_text(line: bytes, kind: str, field: str, place: str) -> str | None:
    """The text of one line of a .txt or .jsonl file."""
    try:
        content = line.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError:
        return None
    if kind == ".txt" or not content.strip():
        return content
    return text_of(parse(content, place), field, place)


def read_list(path: Path, field: str, skip: int) -> Iterator[str]:
    """The items of a JSON list; bytes that are not UTF-8 become surrogates, which `encodable` tells."""
    with opened(path) as file:
        items = parse(file.read().removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape"), str(path))
    if not isinstance(items, list):
        raise ValueError(f"{path} holds no JSON list; name a file of JSON lines .jsonl")
    for number, item in enumerate(items[skip:], start=skip + 1):
        yield text_of(item, field, f"{path} item {number}")


def read_parquet(path: Path, field: str, skip: int) -> Iterator[str | None]:
    """The column `field` of a parquet file without its first rows; row groups before them are not read."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if field not in names:
            raise ValueError(f"{path} has no column {field!r}; write data.field= one of {', '.join(names)}")
        before = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if before + rows > skip:
                values = (
                    value
                    for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[field])
                    for value in column_values(batch.column(0))
                )
                for number, value in enumerate(values, start=before + 1):
                    if number > skip:
                        yield None if value is UNREADABLE else text_of(value, field, f"{path} row {number}")
            before += rows
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"cannot read {path}: {str(error).splitlines()[0]}") from error


def column_values(column: Any) -> list[Any]:
    """Plain values of an Arrow column; `UNREADABLE` for a string that is not UTF-8."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        if len(column) == 1:
            return [UNREADABLE]
        return [value for i in range(len(column)) for value in column_values(column[i : i + 1])]


def parse(text: str, place: str) -> Any:
    """JSON, or a `ValueError` that names the place."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error.msg} at column {error.colno}") from error


def text_of(item: Any, field: str, place: str) -> str:
    """The text of one JSON value: a string, or an object's `field`; "" for null."""
    if isinstance(item, dict):
        if field not in item:
            raise ValueError(f"{place} has no {field!r}; write data.field= one of {', '.join(item)}")
        item = item[field]
    if item is None:
        return ""
    if not isinstance(item, str):
        raise ValueError(f"{place} holds {type(item).__name__} where text is expected")
    return item


def encodable(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON can smuggle in halves of surrogate pairs."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
