"""Tables of plain text, for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

Columns = Sequence[tuple[str, str, str]]
"""Heading, key and format of each column."""


def table_of(columns: Columns, rows: Sequence[Mapping[str, Any]], error: str = "se") -> list[list[str]]:
    """A heading and a line a row, without columns that no row has.

    Args:
        columns: of the table.
        rows: numbers by key.
        error: of a number KEY, KEY_ERROR is shown behind a ±.
    """
    kept = [column for column in columns if any(row.get(column[1]) is not None for row in rows)]
    lines = ([cell(row, key, form, error) for _, key, form in kept] for row in rows)
    return [[heading for heading, _, _ in kept], *lines]


def cell(numbers: Mapping[str, Any], key: str, form: str, error: str = "se") -> str:
    """A number with its error where there is one; a dash where it is not to be had; words as they are."""
    if numbers.get(key) is None:
        return "–"
    if isinstance(numbers[key], str):
        return numbers[key]
    spread = numbers.get(f"{key}_{error}")
    return form.format(numbers[key]) + ("" if spread is None else f" ± {form.replace('+', '').format(spread)}")


def aligned(lines: Sequence[Sequence[str]], words: int = 1) -> str:
    """Columns below each other: the first `words` flush left, numbers flush right."""
    columns = []
    for index, column in enumerate(zip(*lines, strict=True)):
        width = max(map(len, column))
        columns.append([text.ljust(width) if index < words else text.rjust(width) for text in column])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
