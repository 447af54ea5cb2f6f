"""Settings of preference pairs, for reward models and for algorithms that learn from pairs."""

from dataclasses import dataclass
from enum import Enum

from saerl_cli.config.settings import check_settings, setting


class PairsKind(Enum):
    """Where preference pairs come from."""

    planted = "planted"
    """Reviews of the planted language that begin alike and differ in an attribute."""
    file = "file"
    """The file `path`."""


class Prefer(Enum):
    """Which of two reviews is chosen."""

    less = "less"
    more = "more"


@dataclass
class PairsConfig:
    """Pairs of a chosen and a rejected continuation of the same prompt."""

    kind: PairsKind = PairsKind.planted
    """`planted` generates them from the planted language; `file` reads `path`."""
    path: str | None = setting(None, write="FILE", kind=PairsKind.file)
    """A jsonl, json or parquet file, or a glob; JSON also as .gz or .zst. Rows hold prompt, chosen and rejected, or
    chosen and rejected transcripts that agree up to their last "Assistant:", as Anthropic's hh-rlhf does."""
    attribute: str = setting("cursing", kind=PairsKind.planted)
    """Attribute of the planted language in which the two differ."""
    prefer: Prefer = setting(Prefer.less, kind=PairsKind.planted)
    """Which is chosen: the one with `less` or `more` words of the attribute."""
    prompt_tokens: int = setting(6, ">= 1", kind=PairsKind.planted)
    """Words that the two have in common."""
    count: int | None = setting(None, ">= 1")
    """Training pairs, at most; when empty, all of a file, 2,000 planted ones."""
    heldout: int = setting(200, ">= 1")
    """Pairs that training never sees: the last ones of a file."""
    seed: int = setting(0, kind=PairsKind.planted)
    """Seed of the planted pairs."""

    def __post_init__(self) -> None:
        check_settings(self, "pairs")
