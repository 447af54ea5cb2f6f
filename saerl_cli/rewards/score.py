"""A reward: named parts, each a function of completions, and their weighted sum."""

import collections
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saerl_cli.config.reward import Per, RewardConfig, RewardKind, RewardPart
from saerl_cli.rewards.check import import_function
from saerl_cli.rewards.lexicon import Lexicon, read_lexicon
from saerl_cli.rewards.patterns import compiled, heavy_tailed, needs_answers, occurrences, verifier

PartFunction = Callable[..., Sequence[float]]
"""f(prompts, completions, completion_ids) -> one score a completion; ids include the end token, text does not. A part
that `sees_answers` gets a fourth argument: the prompts' right answers, None for those without one."""

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
            function = build_function(part, tokenizer, device)
            parts.append(Part(name, part.weight, function, sees_answers(part, function)))
        except ValueError as error:
            raise ValueError(f"reward.parts.{name}: {error}") from None
    return Reward(tuple(parts))


def build_function(part: RewardPart, tokenizer: Any, device: Any) -> PartFunction:
    """The scoring function of one part."""
    if part.kind is RewardKind.planted:
        return planted_function(part.attribute or "", part.per is Per.token)
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
    if part.kind is RewardKind.count:
        return count_function(part.pattern or "", part.per is Per.token)
    if part.kind is RewardKind.heavy:
        return heavy_function(part)
    if part.kind is RewardKind.verifier:
        return verifier_function(part)
    return import_function(part.function or "")


def sees_answers(part: RewardPart, function: PartFunction) -> bool:
    """Whether a part's function takes the prompts' answers: verifiers, and own functions with such an argument."""
    if part.kind is not RewardKind.python:
        return part.kind is RewardKind.verifier
    try:
        return "answers" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # builtins may have no signature
        return False


def count_function(pattern: str, per_word: bool) -> PartFunction:
    """Matches of a regular expression in a completion, or their number divided by that of its words."""
    expression = compiled(pattern)

    def score(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        return [occurrences(expression, text) / (max(1, len(text.split())) if per_word else 1) for text in completions]

    return score


def heavy_function(part: RewardPart) -> PartFunction:
    """A heavy-tailed function of the matches of a regular expression (`patterns.heavy_tailed`)."""
    expression = compiled(part.pattern or "")

    def score(prompts: list[str], completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        return [heavy_tailed(occurrences(expression, text), part.tail, part.shape, part.scale) for text in completions]

    return score


def verifier_function(part: RewardPart) -> PartFunction:
    """1 for the right answer, 0 for any other."""
    is_right, needs = verifier(part.match, part.pattern, part.tolerance), needs_answers(part.match, part.pattern)

    def score(
        prompts: list[str], completions: list[str], completion_ids: list[list[int]], answers: list[str | None]
    ) -> list[float]:
        if needs and None in answers:
            raise ValueError(f"the prompt {prompts[answers.index(None)][:60]!r} has no answer to verify against")
        return [float(is_right(text, answer)) for text, answer in zip(completions, answers, strict=True)]

    return score


def planted_function(attribute: str, per_token: bool) -> PartFunction:
    """Counts the words of a completion that carry an attribute of the planted language, by the language's labels."""
    from saerl_cli.planted.language import ATTRIBUTES, labels_of, split_words

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
