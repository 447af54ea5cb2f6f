"""What there is to learn from in the planted language: documents, preference pairs, sums. Imports no torch.

Preference pairs are two reviews that begin with the same words and differ in how many of the words behind them carry an
attribute. Both are what the language says after that prompt, so that nothing but the attribute and chance tells them
apart.
"""

from collections.abc import Iterator
from itertools import islice

from saerl_cli.config.groups import DataConfig, ModelConfig, ModelKind, PlantedConfig
from saerl_cli.config.pairs import PairsConfig, Prefer
from saerl_cli.planted.language import ATTRIBUTES, Review, join_words, review, reviews
from saerl_cli.planted.words import NUMBERS

HELDOUT_START = 1_000_000_000
"""Number of the first held-out review, beyond every training review."""
PAIRS_START = {"train": 2_000_000_000, "heldout": 3_000_000_000}
"""Number of the first review in which pairs of a split are looked for, beyond those a model is trained on."""
PLANTED_PAIRS = 2000
"""Training pairs where the settings leave it open."""


def planted_documents(config: PlantedConfig, split: str) -> Iterator[Review]:
    """Write the planted language as documents.

    Args:
        config: gives the seed and the number of training reviews.
        split: "train", `config.documents` reviews; or "heldout", a tenth as many but at least 200, whose numbers are
            disjoint from those.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f'split must be "train" or "heldout", got {split!r}')
    start, number = (0, config.documents) if split == "train" else (HELDOUT_START, max(200, config.documents // 10))
    return (review(config.seed, index) for index in range(start, start + number))


def planted_reviews(data: DataConfig, model: ModelConfig, split: str) -> Iterator[Review]:
    """Write the documents of a split that the settings choose of the planted ones, with their labels."""
    if model.kind is not ModelKind.planted:
        raise ValueError("data=planted belongs to model=planted; write data=text data.path=FILE for another model")
    number = min(data.max_documents or model.planted.documents, model.planted.documents)
    if split == "heldout":
        number = max(1, round(number * data.heldout))
    return islice(planted_documents(model.planted, split), number)


def planted_questions(config: PlantedConfig, split: str) -> Iterator[tuple[str, str]]:
    """Write reviews up to the `is` of their first sum, each with the right answer, whatever the review says.

    Args:
        config: gives the seed and the number of reviews.
        split: `train` or `heldout`.
    """
    for words in (written.words for written in planted_documents(config, split)):
        for end in range(4, len(words)):
            left, operator, right, verb = words[end - 4 : end]
            if verb == "is" and operator in ("plus", "minus") and left in NUMBERS and right in NUMBERS:
                a, b = NUMBERS.index(left), NUMBERS.index(right)
                yield join_words(words[:end]), NUMBERS[a + b if operator == "plus" else a - b]
                break


# --- preference pairs ------------------------------------------------------------------------------------------------


def planted_pairs(config: PairsConfig, model: ModelConfig, split: str) -> list[tuple[str, str, str]]:
    """Find reviews that begin alike and differ in the number of words that carry the attribute.

    Args:
        config: the attribute, which of two is preferred, how many.
        model: must be planted.
        split: `train` or `heldout`.

    Returns:
        Prompt, chosen and rejected continuation of each.

    Raises:
        ValueError: another model, an unknown attribute, or too few pairs.
    """
    if model.kind is not ModelKind.planted:
        raise ValueError("pairs.kind=planted belongs to model=planted; write pairs.kind=file pairs.path=FILE")
    if config.attribute not in ATTRIBUTES:
        raise ValueError(f"pairs.attribute={config.attribute!r} is unknown; there are {', '.join(sorted(ATTRIBUTES))}")
    wanted = config.heldout if split == "heldout" else config.count or PLANTED_PAIRS
    candidates = islice(reviews(config.seed, PAIRS_START[split]), 100 * wanted + 10_000)
    pairs = list(islice(matched_reviews(config, candidates), wanted))
    if len(pairs) < wanted:
        raise ValueError(
            f"only {len(pairs)} pairs of reviews begin with the same pairs.prompt_tokens={config.prompt_tokens} words"
            f" and differ in {config.attribute}, {wanted} are asked for; lower either number"
        )
    return pairs


def matched_reviews(config: PairsConfig, candidates: Iterator[Review]) -> Iterator[tuple[str, str, str]]:
    """Match reviews; every review is in one pair at most."""
    waiting: dict[tuple[str, ...], dict[int, str]] = {}  # prompt -> words with the attribute -> continuation
    for candidate in candidates:
        head, rest = tuple(candidate.words[: config.prompt_tokens]), candidate.words[config.prompt_tokens :]
        if not rest:
            continue
        labels = candidate.labels[len(head) :]
        count = sum(config.attribute in of_word for of_word in labels)
        others = waiting.setdefault(head, {})
        other = next((number for number in others if number != count), None)
        if other is None:
            others.setdefault(count, continuation(rest))
            continue
        less, more = sorted([(count, continuation(rest)), (other, others.pop(other))])
        chosen, rejected = (less, more) if config.prefer is Prefer.less else (more, less)
        yield join_words(head), chosen[1], rejected[1]


def continuation(words: list[str]) -> str:
    """Join words as they follow others: with a space before them, unless they begin with punctuation."""
    text = join_words(words)
    return text if text[0] in ".,!?" else f" {text}"
