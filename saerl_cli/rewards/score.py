"""A reward: named parts, each a function of completions, and their weighted sum."""

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saerl_cli.config.reward import Per, RewardConfig, RewardKind, RewardPart
from saerl_cli.rewards.check import import_function
from saerl_cli.rewards.lexicon import Lexicon, read_lexicon

PartFunction = Callable[[list[str], list[str], list[list[int]]], Sequence[float]]
"""f(prompts, completions, completion_ids) -> one score a completion; ids include the end token, text does not."""

TOTAL = "reward"
"""The key of the weighted sum beside the parts."""


@dataclass(frozen=True)
class Part:
    """One named score and its weight."""

    name: str
    weight: float
    function: PartFunction

    def __call__(self, prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        """One finite number a completion.

        Raises:
            ValueError: the function returned another number of scores, None, or a number that is not finite.
        """
        values = self.function(prompts, completions, completion_ids)
        if len(values) != len(completions):
            raise ValueError(
                f"the reward part {self.name!r} returned {len(values)} scores for {len(completions)} completions"
            )
        for value, completion in zip(values, completions, strict=True):
            if value is None or not math.isfinite(value):
                raise ValueError(
                    f"the reward part {self.name!r} returned {value} for the completion {completion[:60]!r}; "
                    "it must return a finite number for every completion"
                )
        return [float(value) for value in values]


@dataclass(frozen=True)
class Reward:
    """The weighted sum of named parts."""

    parts: tuple[Part, ...]

    def score(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]]
    ) -> dict[str, list[float]]:
        """Every part by name, and their weighted sum under "reward"; one number a completion each."""
        scores = {part.name: part(prompts, completions, completion_ids) for part in self.parts}
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
            parts.append(Part(name, part.weight, build_function(part, tokenizer, device)))
        except ValueError as error:
            raise ValueError(f"reward.parts.{name}: {error}") from None
    return Reward(tuple(parts))


def build_function(part: RewardPart, tokenizer: Any, device: Any) -> PartFunction:
    """The scoring function of one part."""
    if part.kind is RewardKind.world:
        return world_function(part.attribute or "", part.per is Per.token)
    if part.kind is RewardKind.lexicon:
        lexicon = Lexicon(part.words or read_lexicon(part.path or ""), part.per is Per.token)
        return lambda prompts, completions, completion_ids: [lexicon(text) for text in completions]
    if part.kind is RewardKind.vader:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        analyser = SentimentIntensityAnalyzer()
        return lambda prompts, completions, completion_ids: [
            analyser.polarity_scores(text)["compound"] for text in completions
        ]
    if part.kind is RewardKind.hf:
        from saerl_cli.rewards.classifier import Classifier

        return Classifier(part.path or "", tokenizer, device, part.batch_size, part.revision)
    return import_function(part.function or "")


def world_function(attribute: str, per_token: bool) -> PartFunction:
    """Counts the words of a completion that carry an attribute of the embedded language, by the language's labels."""
    from saerl_cli.world.language import ATTRIBUTES, labels_of, split_words

    if attribute not in ATTRIBUTES:
        raise ValueError(f"unknown attribute {attribute!r}; there are {', '.join(sorted(ATTRIBUTES))}")

    def score(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        scores = []
        for prompt, completion in zip(prompts, completions, strict=True):
            before = split_words(prompt)  # a label may depend on the words before
            labels = labels_of([*before, *split_words(completion)])[len(before) :]
            count = sum(attribute in of_word for of_word in labels)
            scores.append(count / max(1, len(labels)) if per_token else float(count))
        return scores

    return score


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
