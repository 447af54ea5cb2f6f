"""What supervised algorithms learn from, as text. Imports no torch: checks before a run call it."""

from dataclasses import dataclass

from saerl_cli.config.groups import DataConfig, DataKind, ModelConfig
from saerl_cli.data.documents import documents
from saerl_cli.data.rows import column, read_rows
from saerl_cli.planted.documents import planted_reviews
from saerl_cli.planted.language import ATTRIBUTES


@dataclass(frozen=True)
class Example:
    """A prompt and what should follow it."""

    prompt: str
    completion: str


def read_examples(path: str) -> list[Example]:
    """Read the prompts and completions of a file, those without a completion left out.

    Raises:
        ValueError: a missing or malformed file, or fewer than two examples.
    """
    need = "algo.examples needs rows of prompt and completion"
    rows = [
        Example(column(row, "prompt", need), column(row, "completion", need))
        for row in read_rows(path, "algo.examples")
    ]
    found = [row for row in rows if row.completion.strip()]
    if len(found) < 2:
        raise ValueError(
            f"algo.examples={path} holds {len(found)} examples; training and held-out ones need two or more"
        )
    return found


def split_examples(examples: list[Example], heldout: float) -> tuple[list[Example], list[Example]]:
    """Split into training and held-out examples; held out is the share `heldout`, at least one, from the end."""
    training = len(examples) - max(1, round(heldout * len(examples)))
    return examples[:training], examples[training:]


def training_documents(data: DataConfig, model: ModelConfig, attribute: str | None, split: str) -> list[str]:
    """Read the documents of a split, or those that carry an attribute of the planted language.

    Raises:
        ValueError: an attribute of other text, an unknown one, or one that no document carries.
    """
    if attribute is None:
        return documents(data, model, split)
    if data.kind is not DataKind.planted:
        raise ValueError("algo.attribute chooses documents of data=planted; leave it out")
    if attribute not in ATTRIBUTES:
        raise ValueError(f"algo.attribute={attribute!r} is unknown; there are {', '.join(sorted(ATTRIBUTES))}")
    found = [r.text for r in planted_reviews(data, model, split) if any(attribute in labels for labels in r.labels)]
    if not found:
        raise ValueError(f"no document of data=planted carries algo.attribute={attribute}; raise data.max_documents")
    return found
