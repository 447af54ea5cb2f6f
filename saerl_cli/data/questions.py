"""Prompts with right answers: the sums of the planted language, or rows of a file. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass

from saerl_cli.config.groups import PlantedConfig
from saerl_cli.data.rows import Row, column, read_rows
from saerl_cli.planted.cache import planted_documents
from saerl_cli.planted.language import join_words
from saerl_cli.planted.words import NUMBERS

PROMPT_COLUMNS = ("prompt", "question", "text")
"""Where a row's prompt is looked for, in this order."""


@dataclass(frozen=True)
class Question:
    """A prompt and its right answer."""

    prompt: str
    answer: str | None
    """None where the file has none."""


def arithmetic_questions(planted: PlantedConfig, split: str) -> Iterator[Question]:
    """Reviews up to the `is` of their first sum, and the sum's right answer, whatever the review says.

    Args:
        planted: gives the seed and the number of reviews.
        split: `train` or `heldout`.
    """
    for review in planted_documents(planted, split):
        words = review.words
        for end in range(4, len(words)):
            left, operator, right, verb = words[end - 4 : end]
            if verb == "is" and operator in ("plus", "minus") and left in NUMBERS and right in NUMBERS:
                a, b = NUMBERS.index(left), NUMBERS.index(right)
                yield Question(join_words(words[:end]), NUMBERS[a + b if operator == "plus" else a - b])
                break


def file_questions(path: str, field: str | None, answer_field: str, template: str) -> Iterator[Question]:
    """The rows of a file; a row without the answer's column has no answer.

    Args:
        path: jsonl, json or parquet, or a glob.
        field: column of the prompt; when None, the first of `PROMPT_COLUMNS` that a row has.
        answer_field: column of the answer.
        template: the prompt's text stands for {prompt} in it.

    Raises:
        ValueError: a missing or malformed file, or a row without a prompt, named.
    """
    for row in read_rows(path, "prompts.path"):
        text = column(row, field or prompt_column(row), "write prompts.field=COLUMN")
        answer = row[1].get(answer_field)
        yield Question(template.replace("{prompt}", text), None if answer is None else str(answer))


def prompt_column(row: Row) -> str:
    """The column of a row that holds its prompt."""
    return next((name for name in PROMPT_COLUMNS if name in row[1]), PROMPT_COLUMNS[0])
