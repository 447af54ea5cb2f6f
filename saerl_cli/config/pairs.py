"""Settings of preference pairs, for reward models and for algorithms that learn from pairs."""

from dataclasses import dataclass
from enum import Enum

from saerl_cli.config.groups import refuse_unless


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
    path: str | None = None
    """A jsonl, json or parquet file, or a glob; JSON also as .gz or .zst. Rows hold prompt, chosen and rejected, or
    chosen and rejected transcripts that agree up to their last "Assistant:", as Anthropic's hh-rlhf does."""
    attribute: str = "cursing"
    """Attribute of the planted language in which the two differ (planted)."""
    prefer: Prefer = Prefer.less
    """Which is chosen: the one with `less` or `more` words of the attribute (planted)."""
    prompt_tokens: int = 6
    """Words that the two have in common, >= 1 (planted)."""
    count: int | None = None
    """Training pairs, at most; when empty, all of a file, 2,000 planted ones."""
    heldout: int = 200
    """Pairs that training never sees: the last ones of a file; >= 1."""
    seed: int = 0
    """Seed of the planted pairs."""

    def __post_init__(self) -> None:
        refuse_unless(self.kind is not PairsKind.file or bool(self.path), "pairs.kind=file needs pairs.path=FILE")
        refuse_unless(self.prompt_tokens >= 1, f"pairs.prompt_tokens must be >= 1, got {self.prompt_tokens}")
        refuse_unless(self.count is None or self.count >= 1, f"pairs.count must be >= 1, got {self.count}")
        refuse_unless(self.heldout >= 1, f"pairs.heldout must be >= 1, got {self.heldout}")
