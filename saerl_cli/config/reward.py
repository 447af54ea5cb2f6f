"""What RLHF is asked for."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from saerl_cli.config.groups import refuse_unless
from saerl_cli.config.renamed import RENAMED_KIND


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
    attribute: str | None = None
    """Attribute of the planted language (kind=planted)."""
    per: Per = Per.completion
    """What counts are divided by (planted, lexicon, count)."""
    path: str | None = None
    """Word list, a word and optionally a tab and its weight a line (lexicon); model folder or Hub id (hf)."""
    words: dict[str, float] = field(default_factory=dict)
    """Words and weights given here instead of a file (lexicon)."""
    revision: str | None = None
    """Hub revision of the reward model (hf)."""
    batch_size: int = 16
    """Completions scored at once (hf)."""
    function: str | None = None
    """module:function, called as f(prompts, completions, completion_ids) -> list of floats; with the prompts' answers
    as a fourth argument where it takes one named answers (python)."""
    pattern: str | None = None
    """Regular expression: counted (count, heavy), or naming the answer in its group 1 (verifier with match=regex)."""
    match: Match = Match.exact
    """When an answer is right: exact, start, regex or numeric (verifier)."""
    tolerance: float = 1e-6
    """Largest difference of equal numbers (verifier with match=numeric)."""
    tail: Tail = Tail.pareto
    """How fast the part grows with the count: exponential, lognormal, student_t or pareto (heavy)."""
    shape: float = 2.0
    """Tail index of pareto, degrees of freedom of student_t, sigma of lognormal; > 0 (heavy)."""
    scale: float = 2.0
    """Count at which the tail begins: about the mean count of the untouched model; > 0 (heavy)."""

    def __post_init__(self) -> None:
        refuse_unless(
            self.kind not in RENAMED_KIND, f"a reward of kind={self.kind} is called {RENAMED_KIND.get(self.kind)} now"
        )
        needs = {
            "planted": ("attribute", self.attribute),
            "lexicon": ("path or words", self.path or self.words),
            "hf": ("path", self.path),
            "python": ("function", self.function),
            "count": ("pattern", self.pattern),
            "heavy": ("pattern", self.pattern),
        }
        if self.kind in needs:
            name, value = needs[self.kind]
            refuse_unless(bool(value), f"a reward part of kind {self.kind} needs {name}")
        refuse_unless(self.pattern is not None or self.match is not Match.regex, "match=regex needs pattern")
        refuse_unless(self.shape > 0 and self.scale > 0, "a heavy part's shape and scale must be > 0")
        refuse_unless(self.tolerance >= 0, f"a verifier's tolerance must be >= 0, got {self.tolerance}")
        refuse_unless(self.batch_size >= 1, f"a reward part's batch_size must be >= 1, got {self.batch_size}")


@dataclass
class RewardConfig:
    """The score of a completion: a weighted sum of named parts."""

    parts: dict[str, RewardPart] = field(default_factory=dict)
    """Name -> part, at least one; every part is logged under its name."""
    normalise: Normalise = Normalise.none
    """What is done to the sum before the algorithm sees it; what is reported stays raw."""
    clip: float | None = None
    """Then clipped to +- this, > 0; the share of clipped scores is logged. Empty: not clipped."""

    def __post_init__(self) -> None:
        refuse_unless(self.clip is None or self.clip > 0, f"reward.clip must be > 0, got {self.clip}")
