"""What RLHF is asked for."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from saerl_cli.config.groups import refuse_unless


class RewardKind(Enum):
    """Where a score comes from."""

    world = "world"
    """Tokens of an attribute of the embedded language, counted by its own labels."""
    lexicon = "lexicon"
    """Words with weights, counted in the completion."""
    vader = "vader"
    """Sentiment of the completion by the vaderSentiment library, in [-1, 1]."""
    hf = "hf"
    """A sequence-classification reward model."""
    python = "python"
    """Your own function."""


class Per(Enum):
    """What a count is divided by."""

    completion = "completion"
    """Nothing: the count itself."""
    token = "token"
    """The number of tokens (world) or words (lexicon) of the completion."""


@dataclass
class RewardPart:
    """One score of a completion. The reward is the weighted sum of the parts."""

    kind: RewardKind = MISSING
    """Where the score comes from."""
    weight: float = 1.0
    """Factor in the sum; negative punishes."""
    attribute: str | None = None
    """Attribute of the embedded language (kind=world)."""
    per: Per = Per.completion
    """What counts are divided by (world, lexicon)."""
    path: str | None = None
    """Word list, a word and optionally a tab and its weight a line (lexicon); model folder or Hub id (hf)."""
    words: dict[str, float] = field(default_factory=dict)
    """Words and weights given here instead of a file (lexicon)."""
    revision: str | None = None
    """Hub revision of the reward model (hf)."""
    batch_size: int = 16
    """Completions scored at once (hf)."""
    function: str | None = None
    """module:function, called as f(prompts, completions, completion_ids) -> list of floats (python)."""

    def __post_init__(self) -> None:
        needs = {
            RewardKind.world: ("attribute", self.attribute),
            RewardKind.lexicon: ("path or words", self.path or self.words),
            RewardKind.hf: ("path", self.path),
            RewardKind.python: ("function", self.function),
        }
        if self.kind in needs:
            name, value = needs[self.kind]
            refuse_unless(bool(value), f"a reward part of kind {self.kind.value} needs {name}")
        refuse_unless(self.batch_size >= 1, f"a reward part's batch_size must be >= 1, got {self.batch_size}")


@dataclass
class RewardConfig:
    """The score of a completion: a weighted sum of named parts."""

    parts: dict[str, RewardPart] = field(default_factory=dict)
    """Name -> part, at least one; every part is logged under its name."""
