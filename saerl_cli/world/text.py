"""Documents from files: a txt with a document a line, a JSON list, JSON lines, or parquet."""

import glob
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from saerl_cli.config.groups import DataConfig

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")


def read_documents(data: DataConfig) -> list[str]:
    """The documents of `data.path`, files in the order of their names, empty ones left out.

    Raises:
        ValueError: no such file, another kind of file, a malformed line (named), or no text at all.
    """
    documents = (document for path in text_files(data) for document in read_file(path, data.field) if document.strip())
    found = list(islice(documents, data.max_documents))
    if not found:
        raise ValueError(f"data.path={data.path} holds no text")
    return found


def split_documents(documents: list[str], data: DataConfig) -> tuple[list[str], list[str]]:
    """Training and held-out documents: the share `data.heldout`, at least one, is taken from the end.

    Raises:
        ValueError: a single document cannot be split.
    """
    if len(documents) < 2:
        raise ValueError(f"data.path={data.path} holds one document; training and held-out text need two or more")
    training = len(documents) - max(1, round(data.heldout * len(documents)))
    return documents[:training], documents[training:]


def text_files(data: DataConfig) -> list[Path]:
    """The files that `data.path` names, sorted."""
    pattern = str(Path(data.path or "").expanduser())
    paths = (
        [Path(pattern)]
        if Path(pattern).exists()
        else [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
    )
    if not paths:
        raise ValueError(f"data.path={data.path} does not exist; write data.path=FILE or a glob in quotes")
    for path in paths:
        if not path.is_file() or path.suffix not in SUFFIXES:
            raise ValueError(f"data.path: {path} is not a {', '.join(SUFFIXES)} file")
    return paths


def read_file(path: Path, field: str) -> Iterator[str]:
    """The documents of one file; objects hold their text under `field`."""
    if path.suffix == ".parquet":
        yield from read_parquet(path, field)
        return
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if path.suffix == ".txt":
        yield from content.split("\n")
    elif path.suffix == ".jsonl":
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                yield text_of(parse(line, f"{path} line {number}"), field, f"{path} line {number}")
    else:
        items = parse(content, str(path))
        if not isinstance(items, list):
            raise ValueError(f"{path} holds no JSON list; name a file of JSON lines .jsonl")
        for number, item in enumerate(items, start=1):
            yield text_of(item, field, f"{path} item {number}")


def read_parquet(path: Path, field: str) -> Iterator[str]:
    """The column `field` of a parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        names = parquet.read_schema(path).names
        if field not in names:
            raise ValueError(f"{path} has no column {field!r}; write data.field= one of {', '.join(names)}")
        column = parquet.read_table(path, columns=[field]).column(field).to_pylist()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"cannot read {path}: {str(error).splitlines()[0]}") from error
    for number, item in enumerate(column, start=1):
        yield text_of(item, field, f"{path} row {number}")


def parse(text: str, place: str) -> Any:
    """JSON, or a `ValueError` that names the place."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error.msg} at column {error.colno}") from error


def text_of(item: Any, field: str, place: str) -> str:
    """The text of one JSON value: a string, or an object's `field`."""
    if isinstance(item, dict):
        if field not in item:
            raise ValueError(f"{place} has no {field!r}; write data.field= one of {', '.join(item)}")
        item = item[field]
    if not isinstance(item, str):
        raise ValueError(f"{place} holds {type(item).__name__} where text is expected")
    return item
