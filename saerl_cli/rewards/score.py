"""A reward: named parts, each a function of completions, and their weighted sum."""

import collections
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saerl_cli.config.reward import RewardConfig
from saerl_cli.rewards.kinds import PartFunction, kind_of

TOTAL = "reward"
"""The key of the weighted sum beside the parts."""


@dataclass(frozen=True)
class Part:
    """One named score and its weight."""

    name: str
    weight: float
    function: PartFunction
    sees_answers: bool = False

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        answers: Sequence[str | None] | None = None,
    ) -> list[float]:
        """One finite number a completion.

        Raises:
            ValueError: the function returned another number of scores, None, or a number that is not finite.
        """
        more = [list(answers or [None] * len(prompts))] if self.sees_answers else []
        values = self.function(prompts, completions, completion_ids, *more)
        if isinstance(values, str) or not hasattr(values, "__len__"):
            raise ValueError(f"the reward part {self.name!r} returned {type(values).__name__}, not a list of numbers")
        if len(values) != len(completions):
            raise ValueError(
                f"the reward part {self.name!r} returned {len(values)} scores for {len(completions)} completions"
            )
        for value, completion in zip(values, completions, strict=True):
            if not is_number(value):
                raise ValueError(
                    f"the reward part {self.name!r} returned {value!r} for the completion {completion[:60]!r}; "
                    "it must return a finite number for every completion"
                )
        return [float(value) for value in values]


def is_number(value: Any) -> bool:
    """Whether a score is one finite number."""
    try:
        return not isinstance(value, str | bytes) and math.isfinite(value)
    except (TypeError, ValueError):
        return False


@dataclass(frozen=True)
class Reward:
    """The weighted sum of named parts."""

    parts: tuple[Part, ...]

    def score(
        self,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        answers: Sequence[str | None] | None = None,
    ) -> dict[str, list[float]]:
        """Every part by name, and their weighted sum under "reward"; one number a completion each."""
        scores = {part.name: part(prompts, completions, completion_ids, answers) for part in self.parts}
        return scores | {TOTAL: self.weighted(scores)}

    def weighted(self, scores: Mapping[str, Sequence[float]]) -> list[float]:
        """The weighted sum of the parts' scores."""
        columns = zip(*(scores[part.name] for part in self.parts), strict=True)
        return [sum(part.weight * x for part, x in zip(self.parts, row, strict=True)) for row in columns]


def build_reward(config: RewardConfig, tokenizer: Any, device: Any = "cpu") -> Reward:
    """The reward a config asks for.

    Args:
        config: its parts.
        tokenizer: of the policy.
        device: where reward models run.

    Raises:
        ValueError: a part that cannot be built, named.
    """
    parts = []
    for name, part in config.parts.items():
        if name == TOTAL:
            raise ValueError(f"reward.parts.{TOTAL}: that is the name of the sum; call the part something else")
        try:
            function = kind_of(part).build(part, tokenizer, device)
            parts.append(Part(name, part.weight, function, takes_answers(function)))
        except ValueError as error:
            raise ValueError(f"reward.parts.{name}: {error}") from None
    return Reward(tuple(parts))


def check_reward(config: RewardConfig) -> None:
    """Refuse a reward that cannot work, without loading torch.

    Raises:
        ValueError: one line naming the part, what is wrong with it and what to write instead.
    """
    for name, part in config.parts.items():
        try:
            kind_of(part).check(part)
        except ValueError as error:
            raise ValueError(f"reward.parts.{name}: {error}") from None
        if not math.isfinite(part.weight):
            raise ValueError(f"reward.parts.{name}: weight must be a finite number, got {part.weight}")


def takes_answers(function: PartFunction) -> bool:
    """Whether a function has an argument for the prompts' right answers."""
    try:
        return "answers" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # builtins may have no signature
        return False


def spread(scores: Sequence[float]) -> dict[str, float]:
    """How much a reward tells completions apart.

    Returns:
        mean and std of the scores; ties, the probability that two different completions of the sample score the
        same; coverage, the share of completions that do not have the most frequent score.
    """
    n = len(scores)
    mean = sum(scores) / n
    counts = collections.Counter(scores)
    pairs = n * (n - 1)
    return {
        "mean": mean,
        "std": math.sqrt(sum((x - mean) ** 2 for x in scores) / max(1, n - 1)),
        "ties": sum(c * (c - 1) for c in counts.values()) / pairs if pairs else 1.0,
        "coverage": 1 - max(counts.values()) / n,
    }
