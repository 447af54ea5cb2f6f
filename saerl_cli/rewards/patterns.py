"""Scores read off the text alone: counts of a pattern, heavy-tailed functions of a count, right answers."""

import math
import re
from collections.abc import Callable
from functools import cache

from saerl_cli.config.reward import Match, Tail

LARGEST = 1e30
"""Bound of a heavy part's value, which single precision still holds."""
NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])-?\.\d+")
"""A number: sign, thousands commas, decimals. Not the end of `10-3`, which is a difference."""


def compiled(pattern: str) -> re.Pattern[str]:
    """A regular expression.

    Raises:
        ValueError: it is none; the message says why.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern={pattern!r} is no regular expression: {error}") from None


def occurrences(pattern: re.Pattern[str], text: str) -> int:
    """How often a pattern matches, without overlaps."""
    return sum(1 for _ in pattern.finditer(text))


# --- heavy tails -----------------------------------------------------------------------------------------------------


@cache
def heavy_tailed(count: int, tail: Tail, shape: float, scale: float) -> float:
    """A deterministic, rising function of a count, 0 or more.

    The value of the distribution `tail` that is exceeded as rarely as `count` is by exponential counts of mean `scale`:
    with probability exp(-count / scale). Counts that look like that under the base model thus give an error of exactly
    this tail, as in the injected-error experiment of Kwa et al. (Catastrophic Goodhart, NeurIPS 2024).

    Args:
        count: occurrences, >= 0.
        tail: the distribution.
        shape: its parameter (see `Tail`).
        scale: mean count.
    """
    u = count / scale
    if tail is Tail.exponential:
        return u
    if tail is Tail.pareto:
        return min(math.expm1(min(u / shape, 600.0)), LARGEST)
    if count == 0:
        return 0.0
    from scipy.special import ndtri_exp, stdtrit

    if tail is Tail.lognormal:
        return min(math.exp(min(-shape * float(ndtri_exp(-u)), 600.0)), LARGEST)
    rare = math.exp(-min(u, 690.0)) / 2  # two tails
    return min(-float(stdtrit(shape, rare)), LARGEST)


# --- answers ---------------------------------------------------------------------------------------------------------


def verifier(match: Match, pattern: str | None, tolerance: float) -> Callable[[str, str | None], bool]:
    """What tells whether a completion holds an answer: f(completion, answer)."""
    if match is Match.numeric:
        return lambda completion, answer: same_number(completion, answer or "", tolerance)
    if match is Match.start:
        return lambda completion, answer: starts_with(completion, answer or "")
    if match is Match.exact:
        return lambda completion, answer: plain(completion) == plain(answer or "")
    expression = compiled(pattern or "")
    if expression.groups == 0:
        return lambda completion, answer: expression.search(completion) is not None
    return lambda completion, answer: plain(last_group(expression, completion)) == plain(answer or "")


def needs_answers(match: Match, pattern: str | None) -> bool:
    """Whether a verifier needs the prompts' answers: all but a regular expression without a group."""
    return match is not Match.regex or compiled(pattern or "").groups > 0


def plain(text: str | None) -> str | None:
    """A text in lower case, single spaces, without a final full stop."""
    return None if text is None else " ".join(text.lower().split()).removesuffix(".").rstrip()


def starts_with(completion: str, answer: str) -> bool:
    """Whether a text begins with another, as whole words."""
    given, wanted = plain(completion) or "", plain(answer) or ""
    return given.startswith(wanted) and not given[len(wanted) : len(wanted) + 1].isalnum()


def last_group(expression: re.Pattern[str], text: str) -> str | None:
    """Group 1 of the last match; None without a match."""
    found = list(expression.finditer(text))
    return found[-1][1] if found else None


def last_number(text: str) -> float | None:
    """The first number behind the last "####" (GSM8K's mark), else the last number; None without one."""
    _, mark, marked = text.rpartition("####")
    found = NUMBER.findall(marked)
    if not found:
        return None
    return float((found[0] if mark else found[-1]).replace(",", ""))


def same_number(completion: str, answer: str, tolerance: float) -> bool:
    """Whether two texts end in the same number."""
    given, wanted = last_number(completion), last_number(answer)
    return given is not None and wanted is not None and abs(given - wanted) <= tolerance
