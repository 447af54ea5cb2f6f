"""What RLHF is asked for."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from saerl_cli.config.groups import refuse_unless
from saerl_cli.config.renamed import RENAMED_KIND
from saerl_cli.config.settings import check_settings, setting


class Per(Enum):
    """What a count is divided by."""

    completion = "completion"
    """Nothing: the count itself."""
    token = "token"
    """The number of tokens (planted) or words (lexicon) of the completion."""


class Match(Enum):
    """When an answer counts as right."""

    exact = "exact"
    """The completion is the answer; case, outer spaces and a final full stop do not matter."""
    start = "start"
    """The completion begins with the answer's words."""
    regex = "regex"
    """What group 1 of the last match of `pattern` holds is the answer; without a group, any match is right and prompts
    need no answers."""
    numeric = "numeric"
    """The last number, or the one behind the last "####", is that of the answer, as GSM8K is scored."""


class Tail(Enum):
    """How fast a heavy part grows with its count c; u = c / scale.

    If counts were exponential with mean `scale`, the part would be distributed as its name says.
    """

    exponential = "exponential"
    """u: a light tail, for comparison."""
    lognormal = "lognormal"
    """exp(shape * z) with the standard normal z of the same rank; shape is sigma."""
    student_t = "student_t"
    """|t| with `shape` degrees of freedom."""
    pareto = "pareto"
    """exp(u / shape) - 1; shape is the tail index."""


class Normalise(Enum):
    """What is done to the weighted sum before an algorithm sees it."""

    none = "none"
    calibrate = "calibrate"
    """A fixed gain and bias that give completions of the untouched model mean 0 and standard deviation 1."""
    running = "running"
    """Less the mean, divided by the standard deviation, of all scores so far."""


@dataclass
class RewardPart:
    """One score of a completion. The reward is the weighted sum of the parts."""

    kind: str = MISSING
    """Where the score comes from: planted (tokens of an attribute of the planted language, by its own labels), lexicon
    (words with weights), vader (sentiment by the vaderSentiment library), hf (a sequence classifier), python (your own
    function), count (matches of a regular expression), heavy (a heavy-tailed function of such a count, an injected
    error), verifier (1 for the prompt's right answer, else 0)."""
    weight: float = 1.0
    """Factor in the sum; negative punishes."""
    attribute: str | None = setting(None, write="NAME", kind="planted")
    """Attribute of the planted language."""
    per: Per = setting(Per.completion, kind=("planted", "lexicon", "count"))
    """What counts are divided by."""
    path: str | None = setting(None, kind=("lexicon", "hf"))
    """Word list, a word and optionally a tab and its weight a line (lexicon); model folder or Hub id (hf)."""
    words: dict[str, float] = setting(dict, kind="lexicon")
    """Words and weights given here instead of a file."""
    revision: str | None = setting(None, kind="hf")
    """Hub revision of the reward model."""
    batch_size: int = setting(16, ">= 1", kind="hf")
    """Completions scored at once."""
    function: str | None = setting(None, write="MODULE:FUNCTION", kind="python")
    """module:function, called as f(prompts, completions, completion_ids) -> list of floats; with the prompts' answers
    as a fourth argument where it takes one named answers."""
    pattern: str | None = setting(
        None,
        only=({"kind": ("count", "heavy")}, {"kind": "verifier", "match": Match.regex}),
        write="REGEX",
    )
    """Regular expression: counted (count, heavy), or naming the answer in its group 1 (verifier)."""
    match: Match = setting(Match.exact, kind="verifier")
    """When an answer is right."""
    tolerance: float = setting(1e-6, ">= 0", kind="verifier", match=Match.numeric)
    """Largest difference of equal numbers."""
    tail: Tail = setting(Tail.pareto, kind="heavy")
    """How fast the part grows with the count."""
    shape: float = setting(2.0, "> 0", kind="heavy", tail=(Tail.pareto, Tail.student_t, Tail.lognormal))
    """Tail index of pareto, degrees of freedom of student_t, sigma of lognormal."""
    scale: float = setting(2.0, "> 0", kind="heavy")
    """Count at which the tail begins: about the mean count of the untouched model."""

    def __post_init__(self) -> None:
        refuse_unless(
            self.kind not in RENAMED_KIND, f"a reward of kind={self.kind} is called {RENAMED_KIND.get(self.kind)} now"
        )
        check_settings(self, "reward.parts.NAME")
        if self.kind in ("lexicon", "hf"):
            ways = "path or words" if self.kind == "lexicon" else "path"
            refuse_unless(bool(self.path or self.words), f"a reward part of kind {self.kind} needs {ways}")


@dataclass
class RewardConfig:
    """The score of a completion: a weighted sum of named parts."""

    parts: dict[str, RewardPart] = field(default_factory=dict)
    """Name -> part, at least one; every part is logged under its name."""
    normalise: Normalise = Normalise.none
    """What is done to the sum before the algorithm sees it; what is reported stays raw."""
    clip: float | None = setting(None, "> 0")
    """Then clipped to +- this; the share of clipped scores is logged. Empty: not clipped."""

    def __post_init__(self) -> None:
        check_settings(self, "reward")
