"""Words with weights, found in a text."""

import re
from collections.abc import Mapping
from pathlib import Path


def read_lexicon(path: str | Path) -> dict[str, float]:
    """A word list: a word or phrase a line, optionally a tab and its weight (1 without); further columns are ignored.

    Words are compared in lower case. Where a word stands twice, the last line counts.

    Raises:
        ValueError: unreadable or empty file, or a malformed line, named by its number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"cannot read the word list {path}: {reason}") from None
    weights: dict[str, float] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        word, *rest = line.split("\t")
        if not word.strip():
            raise ValueError(f"{path}, line {number}: a weight without a word; write WORD or WORD<tab>WEIGHT")
        try:
            weights[word.strip().lower()] = float(rest[0]) if rest else 1.0
        except ValueError:
            raise ValueError(
                f"{path}, line {number}: {rest[0]!r} is not a number; write WORD or WORD<tab>WEIGHT"
            ) from None
    if not weights:
        raise ValueError(f"the word list {path} is empty; write a word a line")
    return weights


class Lexicon:
    """The summed weights of the words in a text: whole words, any case, the longest phrase first.

    Args:
        weights: word or phrase -> weight.
        per_word: divide by the number of words of the text.
    """

    def __init__(self, weights: Mapping[str, float], per_word: bool = False):
        self.weights = {word.lower(): weight for word, weight in weights.items()}
        self.per_word = per_word
        longest_first = sorted(self.weights, key=lambda word: (-len(word), word))
        self.pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")

    def __call__(self, text: str) -> float:
        """The score of one text."""
        total = sum(self.weights[match] for match in self.pattern.findall(text.lower()))
        return total / max(1, len(re.findall(r"\w+", text))) if self.per_word else total
