"""Rows of a file as dictionaries: JSON lines, a JSON list, or parquet; lines and lists may be .gz or .zst."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saerl_cli.data.text import kind_of, named_files, opened, parse

SUFFIXES = (".jsonl", ".json", ".parquet")

Row = tuple[str, dict[str, Any]]
"""Where a row stands, for messages, and its columns."""


def read_rows(pattern: str, setting: str) -> Iterator[Row]:
    """The rows of a file or of a glob's files, sorted by name, read lazily (a JSON list is parsed whole).

    Args:
        pattern: path or glob.
        setting: what the user wrote it as, for messages: `pairs.path`.

    Raises:
        ValueError: no such file, another kind of file, or a malformed row, named.
    """
    for path in named_files(pattern, setting, SUFFIXES):
        try:
            yield from parquet_rows(path) if kind_of(path) == ".parquet" else json_rows(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read {path}: {str(error).splitlines()[0]}") from None


def json_rows(path: Path) -> Iterator[Row]:
    """The objects of a file of JSON lines, or of a JSON list, whatever the file's name says."""
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            text = line.decode("utf-8-sig").strip()
            if number == 1 and text.startswith("["):
                items = parse(text + file.read().decode("utf-8"), str(path))
                yield from (as_row(item, f"{path} item {index}") for index, item in enumerate(items, start=1))
                return
            if text:
                yield as_row(parse(text, f"{path} line {number}"), f"{path} line {number}")


def parquet_rows(path: Path) -> Iterator[Row]:
    """The rows of a parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        items = (item for batch in parquet.ParquetFile(path).iter_batches(1024) for item in batch.to_pylist())
        yield from (as_row(item, f"{path} row {number}") for number, item in enumerate(items, start=1))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"cannot read {path}: {str(error).splitlines()[0]}") from None


def as_row(item: Any, place: str) -> Row:
    """One JSON value as a row; `ValueError` when it is no object."""
    if not isinstance(item, dict):
        raise ValueError(f"{place} holds {type(item).__name__} where an object with named columns is expected")
    return place, item


def column(row: Row, name: str, setting: str) -> str:
    """The text in a column.

    Args:
        row: of `read_rows`.
        name: the column.
        setting: what to change when it is not there, for messages.

    Raises:
        ValueError: no such column, or no text in it.
    """
    place, columns = row
    if name not in columns:
        raise ValueError(f"{place} has no {name!r} but {', '.join(columns) or 'nothing'}; {setting}")
    if not isinstance(columns[name], str):
        raise ValueError(f"{place}: {name!r} holds {type(columns[name]).__name__} where text is expected")
    return columns[name]
