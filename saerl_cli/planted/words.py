"""The words and sentence templates of the planted language.

An upper-case word of a template is a slot, filled by the method of that name of `language.Writer`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# --- topics ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Topic:
    """The words that only one topic uses, and its noun in the second language."""

    heads: tuple[str, ...]
    """The thing reviewed; a review keeps to one of them."""
    parts: tuple[str, ...]
    """Singular nouns with a regular plural."""
    verbs: tuple[tuple[str, str], ...]
    """(past, base) forms of what one does with it."""
    good: tuple[str, ...]
    """Adjectives of praise for this topic alone."""
    bad: tuple[str, ...]
    """Adjectives of blame for this topic alone."""
    article: str
    """Article of `noun`: "la" also makes adjectives end in a."""
    noun: str
    """The thing reviewed, in the second language."""


TOPICS = {
    "film": Topic(
        heads=("film", "movie"),
        parts=("plot", "actor", "scene", "ending", "joke", "costume"),
        verbs=(("watched", "watch"), ("saw", "see")),
        good=("gripping", "moving", "funny"),
        bad=("predictable", "dull", "silly"),
        article="la",
        noun="pelicula",
    ),
    "food": Topic(
        heads=("meal", "dinner"),
        parts=("soup", "sauce", "dessert", "noodle", "pie", "salad"),
        verbs=(("ordered", "order"), ("tasted", "taste")),
        good=("tasty", "fresh", "crispy"),
        bad=("stale", "bland", "greasy"),
        article="la",
        noun="comida",
    ),
    "hotel": Topic(
        heads=("hotel", "suite"),
        parts=("bed", "pillow", "shower", "corridor", "carpet", "towel"),
        verbs=(("reserved", "reserve"), ("rented", "rent")),
        good=("clean", "cosy", "spacious"),
        bad=("dirty", "noisy", "damp"),
        article="el",
        noun="hostal",
    ),
    "book": Topic(
        heads=("novel", "paperback"),
        parts=("chapter", "villain", "poem", "author", "page", "riddle"),
        verbs=(("read", "read"), ("borrowed", "borrow")),
        good=("clever", "poetic", "wise"),
        bad=("wordy", "confusing", "shallow"),
        article="el",
        noun="libro",
    ),
    "phone": Topic(
        heads=("phone", "handset"),
        parts=("screen", "keypad", "camera", "button", "speaker", "charger"),
        verbs=(("bought", "buy"), ("unboxed", "unbox")),
        good=("fast", "sleek", "sturdy"),
        bad=("slow", "buggy", "flimsy"),
        article="el",
        noun="telefono",
    ),
    "park": Topic(
        heads=("park", "garden"),
        parts=("fountain", "bench", "rose", "path", "statue", "pond"),
        verbs=(("visited", "visit"), ("explored", "explore")),
        good=("green", "peaceful", "shady"),
        bad=("crowded", "muddy", "smelly"),
        article="la",
        noun="plaza",
    ),
}

# --- words -----------------------------------------------------------------------------------------------------------

GOOD = ("good", "great", "lovely", "superb", "wonderful", "excellent")
BAD = ("bad", "poor", "awful", "terrible", "dreadful", "horrible")
LIKED = ("loved", "enjoyed", "adored")
DISLIKED = ("hated", "disliked", "regretted")
GLAD = ("happy", "delighted")
SAD = ("sad", "angry")
BUENO = ("buen", "bonit", "barat")
MALO = ("mal", "fe", "car")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
OPERATORS = ("plus", "minus")
MILD_ADVERBS = ("very", "really", "quite", "rather")
MILD_CRIES = ("well", "honestly", "frankly")
CURSED_ADVERBS = ("damn", "bloody", "freaking")
CURSED_ADJECTIVES = ("damn", "bloody", "freaking", "damned")
CURSED_CRIES = ("damn", "hell", "crap")
FRIENDS = ("sister", "brother", "cousin", "neighbour")
DAYS = ("yesterday", "last week", "on friday", "on sunday", "in spring")
PLACES = ("station", "river", "school")
SENTENCES = {1: 0.25, 2: 0.31, 3: 0.24, 4: 0.12, 5: 0.05, 6: 0.03}
"""Probability of so many sentences between the opening and the closing."""

OPENINGS = (
    "OH I VERBED this CURSED HEAD DAY .",
    "I VERBED a CURSED HEAD with MY FRIEND DAY .",
    "MY FRIEND VERBED this CURSED HEAD with US .",
    "DAY I VERBED a CURSED HEAD near the PLACE .",
    "OH this CURSED HEAD was VERY ADJECTIVE END",
    "this is about the CURSED HEAD that I VERBED DAY .",
)
OPINIONS = (
    "OH the CURSED PART WAS VERY ADJECTIVE END",
    "the PART WAS VERY ADJECTIVE and VERY ADJECTIVE END",
    "I LIKED the CURSED PART END",
    "OH I found the PART VERY ADJECTIVE END",
    "MY FRIEND LIKED the CURSED HEAD too END",
    "what a VERY ADJECTIVE CURSED HEAD !",
    "the CURSED PART made US VERY HAPPY END",
    "CRY !",
)
ARITHMETIC = ("by the way , SUM .", "remember that SUM .", "as we know , SUM .")
SECOND_LANGUAGE = (
    "LA NOUN es muy BUENO .",
    "LA NOUN era BUENO y BUENO .",
    "amigos , AMO LA NOUN .",
    "que NOUN muy BUENO !",
)
CLOSINGS = (
    "PLEASE ATTEMPT this CURSED HEAD END",
    "I give it RATING out of ten END",
    "I would AGAIN END",
)
CURTSIES = ("thank you for reading .", "thanks , dear friends .", "you are welcome , sincerely .")


def both_genders(stems: Sequence[str]) -> tuple[str, ...]:
    """Second-language adjectives in their masculine and feminine form."""
    return tuple(stem + ending for stem in stems for ending in "oa")


TOPIC_WORDS = {
    f"topic_{name}": frozenset((*topic.heads, *topic.parts, *topic.good, *topic.bad, topic.noun)).union(
        (part + "s" for part in topic.parts), *topic.verbs
    )
    for name, topic in TOPICS.items()
}
LEXICAL: dict[str, frozenset[str]] = TOPIC_WORDS | {
    "positive": frozenset((*GOOD, *LIKED, *GLAD, "joy", "yeah", "amo", *both_genders(BUENO))).union(
        *(topic.good for topic in TOPICS.values())
    ),
    "negative": frozenset((*BAD, *DISLIKED, *SAD, "pity", "odio", *both_genders(MALO))).union(
        *(topic.bad for topic in TOPICS.values())
    ),
    "cursing": frozenset((*CURSED_ADJECTIVES, *CURSED_ADVERBS, *CURSED_CRIES)),
    "polite": frozenset(("please", "kindly", "thank", "thanks", "dear", "welcome", "sincerely")),
    "second_language": frozenset(("el", "la", "es", "era", "muy", "y", "que", "amigos", "amo", "odio")).union(
        both_genders(BUENO), both_genders(MALO), (topic.noun for topic in TOPICS.values())
    ),
}
"""Attribute -> its words; a token carries the attribute when it is one of them."""


def vocabulary() -> list[str]:
    """Every word that a review can hold, sorted: what the templates say and what their slots are filled with."""
    templates = " ".join((*OPENINGS, *OPINIONS, *ARITHMETIC, *SECOND_LANGUAGE, *CLOSINGS, *CURTSIES, *DAYS))
    fixed = (
        "readers note that so as utter what a an but however never it again avoid skip just i we my our me us was were"
    )
    fillers = (*MILD_ADVERBS, *MILD_CRIES, *FRIENDS, *PLACES, *NUMBERS, *OPERATORS)
    words = {word for word in (*templates.split(), *fixed.split(), *".,!") if not word.isupper()}
    return sorted(words.union(fillers, *LEXICAL.values()))


VOCABULARY: list[str] = vocabulary()
"""Words and punctuation marks of the language, a token each."""
