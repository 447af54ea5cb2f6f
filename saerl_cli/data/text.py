"""Texts of files: a txt with a document a line, JSON lines, a JSON list, or parquet; lines may be .gz or .zst.

Files are read lazily, a line or a parquet batch at a time (a JSON list is parsed whole), and a reader can go on where
another stood (`Place`).
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
