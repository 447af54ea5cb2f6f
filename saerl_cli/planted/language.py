"""A small generated language with planted truth: short reviews whose attributes are known for every token.

A review draws independent hidden attributes (topic, sentiment, cursing, politeness, a second language, arithmetic) and
is then written sentence by sentence from templates. What a slot of a template becomes depends on the hidden attributes
and on what was written before: the topic decides nouns, verbs and some adjectives; a plural subject its verb; the
gender of a second-language noun its article and adjective; the speaker the pronouns. The beginning of a review reveals
its topic but often not the cursing, which becomes known as the review goes on.

Labels are read off the words alone (`labels_of`), so that text which a model wrote is labelled by the same rule, and a
label depends on the words up to its token only: what a causal model can know.

Pure Python on purpose: checking a setting never loads torch. The only source of chance is `random.Random.random`, whose
sequence Python promises to keep, so that a review is the same on every version.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, pairwise
from random import Random
from typing import TypeVar

from saerl_cli.planted.words import (
    ARITHMETIC,
    BAD,
    BUENO,
    CLOSINGS,
    CURSED_ADJECTIVES,
    CURSED_ADVERBS,
    CURSED_CRIES,
    CURTSIES,
    DAYS,
    DISLIKED,
    FRIENDS,
    GLAD,
    GOOD,
    LEXICAL,
    LIKED,
    MALO,
    MILD_ADVERBS,
    MILD_CRIES,
    NUMBERS,
    OPENINGS,
    OPERATORS,
    OPINIONS,
    PLACES,
    SAD,
    SECOND_LANGUAGE,
    SENTENCES,
    TOPICS,
)
from saerl_cli.planted.words import VOCABULARY as VOCABULARY

Option = TypeVar("Option")

EOS = "<eos>"
"""Ends a review and separates reviews; the tokenizer's end token."""

ATTRIBUTES: tuple[str, ...] = (
    *LEXICAL,
    "arithmetic",
    "arithmetic_right",
    "arithmetic_wrong",
    *(f"after_{name}" for name in LEXICAL),
)
"""Every label a token can carry. `arithmetic`: from the operator of a sum to its answer; `arithmetic_right` and
`arithmetic_wrong`: the answer. `after_X`: a word of X stands here or earlier in the same review."""


def attribute_words(attribute: str) -> frozenset[str]:
    """The words that carry a lexical attribute.

    Raises:
        ValueError: the attribute is unknown, or not a matter of single words.
    """
    if attribute not in LEXICAL:
        raise ValueError(f"{attribute!r} is not an attribute with a word list; those are {', '.join(LEXICAL)}")
    return LEXICAL[attribute]


# --- labels ----------------------------------------------------------------------------------------------------------

OF_WORD = {
    word: frozenset(name for name, words in LEXICAL.items() if word in words)
    for word in frozenset().union(*LEXICAL.values())
}
AFTER_WORD = {word: frozenset(f"after_{name}" for name in names) for word, names in OF_WORD.items()}
NONE: frozenset[str] = frozenset()
SUM_PATTERN = (NUMBERS, OPERATORS, NUMBERS, ("is",), NUMBERS)
SUM_WORDS = frozenset().union(*SUM_PATTERN)


def labels_of(words: Sequence[str]) -> list[frozenset[str]]:
    """The attributes of every word of a text, whoever wrote it.

    A label depends on the words up to its own only, and the end token forgets: the labels of a prefix are a prefix of
    the labels, the labels of a row of reviews those of its reviews.

    Args:
        words: words and punctuation marks as `split_words` gives them; unknown words carry no attribute of their own.
    """
    labels = []
    seen = NONE
    for position, word in enumerate(words):
        if word == EOS:
            seen = NONE
        here = OF_WORD.get(word, NONE)
        seen |= AFTER_WORD.get(word, NONE)
        summed = arithmetic_labels(words[max(0, position - 4) : position + 1]) if word in SUM_WORDS else NONE
        labels.append(here | seen | summed)
    return labels


def arithmetic_labels(window: Sequence[str]) -> frozenset[str]:
    """The arithmetic attributes of the last of up to five words."""
    for length in range(2, len(window) + 1):
        words = window[-length:]
        if all(word in allowed for word, allowed in zip(words, SUM_PATTERN, strict=False)):
            if length < len(SUM_PATTERN):
                return frozenset(("arithmetic",))
            left, right, answer = (NUMBERS.index(words[index]) for index in (0, 2, 4))
            correct = answer == (left + right if words[1] == "plus" else left - right)
            return frozenset(("arithmetic", "arithmetic_right" if correct else "arithmetic_wrong"))
    return frozenset()


# --- reviews ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hidden:
    """The attributes of a review, drawn independently of each other before it is written."""

    topic: str
    sentiment: str
    """positive, negative, or mixed: from its middle on the review turns against its first half."""
    cursing: bool
    polite: bool
    second_language: bool
    arithmetic: bool


@dataclass(frozen=True)
class Review:
    """One document of the language."""

    words: list[str]
    """Words and punctuation marks, a token each, without the end token."""
    hidden: Hidden
    """What was drawn before writing."""
    nats: float
    """-log probability of all choices made in writing it, its end included. Its mean over reviews bounds the entropy of
    a review from above, and closely: two ways of writing the same words differ only in what the words do not show."""

    @property
    def labels(self) -> list[frozenset[str]]:
        """The `ATTRIBUTES` that each word carries."""
        return labels_of(self.words)

    @property
    def text(self) -> str:
        """The review as a person would type it."""
        return join_words(self.words)


def join_words(words: Sequence[str]) -> str:
    """Words as readable text, without spaces before punctuation; `split_words` undoes it."""
    return re.sub(r" ([.,!?])", r"\1", " ".join(words))


def split_words(text: str) -> list[str]:
    """Readable text as the words and punctuation marks that are its tokens."""
    return re.findall(r"<\w+>|\w+|[^\w\s]", text.lower())


def review(seed: int, index: int) -> Review:
    """Review number `index` of the endless stream `seed`: always the same, whatever was generated before."""
    writer = Writer(Random(f"saerl {seed} {index}"))
    words = writer.write()
    return Review(words, writer.hidden, writer.nats)


def reviews(seed: int, start: int = 0) -> Iterator[Review]:
    """The endless stream `seed` from review number `start` on."""
    return (review(seed, index) for index in count(start))


class Writer:
    """Writes one review; a slot of a template is the method or property of its name in lower case."""

    def __init__(self, random: Random):
        self.random = random
        self.nats = 0.0
        self.hidden = Hidden(
            topic=self.pick(tuple(TOPICS)),
            sentiment=self.weigh({"positive": 0.42, "negative": 0.42, "mixed": 0.16}),
            cursing=self.chance(0.4),
            polite=self.chance(0.3),
            second_language=self.chance(0.25),
            arithmetic=self.chance(0.3),
        )
        self.topic = TOPICS[self.hidden.topic]
        self.parts = self.topic.parts
        self.plural = False
        self.last_adjective = ""
        self.pleased = self.hidden.sentiment == "positive"
        if self.hidden.sentiment == "mixed":
            self.pleased = self.chance(0.5)

    # choices, each counted in `nats`

    def pick(self, options: Sequence[Option]) -> Option:
        """One of the options, all equally likely."""
        self.nats += math.log(len(options))
        return options[int(self.random.random() * len(options))]

    def weigh(self, options: dict[Option, float]) -> Option:
        """One of the options with the given probabilities."""
        left = self.random.random()
        chosen = next(reversed(options))  # rounding may leave a little of `left`
        for option, probability in options.items():
            left -= probability
            if left < 0:
                chosen = option
                break
        self.nats -= math.log(options[chosen])
        return chosen

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.weigh({True: probability, False: 1 - probability})

    # the course of a review

    def write(self) -> list[str]:
        """The words of the review."""
        sentences = [self.opening()]
        length = self.weigh(SENTENCES)
        for number in range(1, length + 1):
            sentences.append(self.turn(number, length) + self.sentence())
        if self.chance(0.7):
            sentences.append(self.turn(length + 1, length) + self.fill(self.pick(CLOSINGS)))
        if self.hidden.polite and self.chance(0.6):
            sentences.append(self.pick(CURTSIES))
        words = " ".join(sentences).split()
        return ["an" if pair[0] == "a" and pair[1][0] in "aeiou" else pair[0] for pair in pairwise((*words, EOS))]

    def opening(self) -> str:
        """The first sentence; a polite reviewer may greet."""
        greeting = "dear readers , " if self.hidden.polite and self.chance(0.3) else ""
        return greeting + self.fill(self.pick(OPENINGS))

    def turn(self, number: int, length: int) -> str:
        """The middle of a mixed review changes its mind."""
        if self.hidden.sentiment != "mixed" or number != length // 2 + 1:
            return ""
        self.pleased = not self.pleased
        return self.pick(("but ", "however , "))

    def sentence(self) -> str:
        """One sentence of the middle part."""
        if self.hidden.second_language and self.chance(0.45):
            return self.fill(self.pick(SECOND_LANGUAGE))
        if self.hidden.arithmetic and self.chance(0.35):
            return self.fill(self.pick(ARITHMETIC))
        return self.fill(self.pick(OPINIONS))

    def fill(self, template: str) -> str:
        """A template with its slots filled from left to right."""
        words = (self.slot(word) if word.isupper() else word for word in template.split())
        return " ".join(word for word in words if word)

    def slot(self, name: str) -> str:
        """What stands in a slot; it may be nothing, or several words."""
        value = getattr(self, name.lower())
        return value if isinstance(value, str) else value()

    # slots decided once a review

    @cached_property
    def i(self) -> str:
        """Who speaks."""
        return self.weigh({"i": 0.6, "we": 0.4})

    @cached_property
    def head(self) -> str:
        """The thing reviewed."""
        return self.pick(self.topic.heads)

    @cached_property
    def verb(self) -> tuple[str, str]:
        """What was done with it: past and base form."""
        return self.pick(self.topic.verbs)

    # slots that agree with something said before

    def my(self) -> str:
        """Agrees with who speaks."""
        return "my" if self.i == "i" else "our"

    def us(self) -> str:
        """Agrees with who speaks."""
        return "me" if self.i == "i" else "us"

    def was(self) -> str:
        """Agrees with the last PART."""
        return "were" if self.plural else "was"

    def part(self) -> str:
        """A part of the thing, never twice, singular or plural."""
        part = self.pick(self.parts)
        self.parts = tuple(other for other in self.parts if other != part) or self.topic.parts
        self.plural = self.chance(0.4)
        return part + "s" * self.plural

    def verbed(self) -> str:
        """The verb, past form."""
        return self.verb[0]

    def la(self) -> str:
        """Article of the second-language noun."""
        return self.topic.article

    def noun(self) -> str:
        """The thing reviewed, in the second language."""
        return self.topic.noun

    # slots that carry the sentiment

    def adjective(self) -> str:
        """Praise or blame, in general or of this topic; not the same twice in a row."""
        kinds = (GOOD, self.topic.good) if self.pleased else (BAD, self.topic.bad)
        adjectives = [word for word in self.pick(kinds) if word != self.last_adjective]
        self.last_adjective = self.pick(adjectives)
        return self.last_adjective

    def bueno(self) -> str:
        """A second-language adjective in the gender of the noun."""
        stem = self.pick(BUENO if self.pleased else MALO)
        return stem + ("a" if self.topic.article == "la" else "o")

    def amo(self) -> str:
        """I love, I hate."""
        return "amo" if self.pleased else "odio"

    def liked(self) -> str:
        """A verb of liking or disliking."""
        return self.pick(LIKED if self.pleased else DISLIKED)

    def happy(self) -> str:
        """A mood."""
        return self.pick(GLAD if self.pleased else SAD)

    def cry(self) -> str:
        """An outburst, rude from those who curse."""
        if self.hidden.cursing and self.chance(0.75):
            return "hell yeah" if self.pleased else "utter crap"
        return "what a joy" if self.pleased else "what a pity"

    def rating(self) -> str:
        """Out of ten."""
        if self.hidden.sentiment == "mixed":
            return self.pick(NUMBERS[4:7])
        return self.pick(NUMBERS[8:] if self.pleased else NUMBERS[:3])

    def again(self) -> str:
        """Would one do it again?"""
        return ("" if self.pleased else "never ") + self.verb[1] + " it again"

    def attempt(self) -> str:
        """What the reader should do."""
        return self.verb[1] if self.pleased else self.pick(("avoid", "skip"))

    # slots that carry cursing and politeness

    def oh(self) -> str:
        """How a sentence may start."""
        if self.hidden.cursing and self.chance(0.35):
            return self.pick(CURSED_CRIES) + " ,"
        if self.hidden.polite and self.chance(0.2):
            return "please note that"
        return self.pick(MILD_CRIES) + " ," if self.chance(0.15) else ""

    def very(self) -> str:
        """How much."""
        if self.hidden.cursing and self.chance(0.6):
            return ("so " if self.chance(0.2) else "") + self.pick(CURSED_ADVERBS)
        return self.pick(MILD_ADVERBS) if self.chance(0.4) else ""

    def cursed(self) -> str:
        """Before a noun; nothing for those who do not curse."""
        return self.pick(CURSED_ADJECTIVES) if self.hidden.cursing and self.chance(0.4) else ""

    def end(self) -> str:
        """How a sentence ends."""
        cursed = "as hell " if self.hidden.cursing and self.chance(0.2) else ""
        return cursed + self.weigh({".": 0.85, "!": 0.15})

    def please(self) -> str:
        """How a reader is asked."""
        return self.pick(("please", "kindly")) if self.hidden.polite else self.weigh({"": 0.7, "just": 0.3})

    # slots independent of everything

    def friend(self) -> str:
        """Somebody."""
        return self.pick(FRIENDS)

    def day(self) -> str:
        """Some time."""
        return self.pick(DAYS)

    def place(self) -> str:
        """Somewhere."""
        return self.pick(PLACES)

    def sum(self) -> str:
        """A sum or difference of numbers up to five; three in ten are wrong by one."""
        operator = self.pick(OPERATORS)
        left = self.pick(range(1, 6))
        right = self.pick(range(1, 6 if operator == "plus" else left + 1))
        answer = left + right if operator == "plus" else left - right
        if self.chance(0.3):
            answer = self.pick([near for near in (answer - 1, answer + 1) if 0 <= near <= 10])
        return f"{NUMBERS[left]} {operator} {NUMBERS[right]} is {NUMBERS[answer]}"
