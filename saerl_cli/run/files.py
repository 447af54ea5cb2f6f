"""Files of a run: written aside and renamed, so that a reader sees the whole of one or nothing of it."""

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically.

    Raises:
        ValueError: a number in it is NaN or infinite; the message names its key.
    """
    refuse_non_finite(value, path.name)
    write_text(path, as_json(value) + "\n")


def as_json(value: Any) -> str:
    """Plain data as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)


def write_text(path: Path, text: str) -> None:
    """Write text atomically."""
    partial = partial_name(path)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def append_jsonl(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON object as a line; a line cut by a kill is skipped by `read_jsonl`.

    Raises:
        ValueError: a number in it is NaN or infinite; the message names its key.
    """
    refuse_non_finite(value, path.name)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file; `ValueError` naming the file when it is malformed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is malformed JSON: {error}") from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that `append_jsonl` wrote; none when there is no file. A torn last line is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last newline is torn or empty
    return [json.loads(line) for line in lines if line]


def last_jsonl(path: Path, count: int, reach: int = 2**18) -> list[dict[str, Any]]:
    """The last objects of such a file, at most `count`, without reading more than `reach` bytes of it."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        start = max(0, path.stat().st_size - reach)
        file.seek(start)
        lines = file.read().split(b"\n")[:-1]
    return [json.loads(line) for line in lines[1 if start else 0 :][-count:] if line]


def refuse_non_finite(value: Any, name: str) -> None:
    """`ValueError` naming the first NaN or infinity inside plain data."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}: only finite numbers are written")
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in items:
        refuse_non_finite(inner, f"{name}: {key}" if isinstance(inner, float | int) else f"{name}.{key}")


def write_safetensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically."""
    from safetensors.torch import save_file

    partial = partial_name(path)
    save_file(dict(tensors), partial, dict(metadata or {}))
    flush(partial)
    os.replace(partial, path)


@contextlib.contextmanager
def atomic_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes the name `path` only when the block ends without an error.

    Args:
        path: the final name; its parent exists.
        replace: whether an existing folder gives way.

    Raises:
        ValueError: `path` exists and `replace` is off.
    """
    if path.exists() and not replace:
        raise ValueError(f"{path} exists already")
    partial = partial_name(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                flush(file)
        old = path.with_name(f".{path.name}.old.{os.getpid()}")
        if path.exists():
            os.replace(path, old)  # a rename cannot replace a folder that is not empty
        os.replace(partial, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_name(path: Path) -> Path:
    """Where `path` is written before it is renamed: hidden, beside it, one a process."""
    return path.with_name(f".{path.name}.partial.{os.getpid()}")


def flush(path: Path) -> None:
    """Bring a written file to the disk, so that a rename never outlives its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
