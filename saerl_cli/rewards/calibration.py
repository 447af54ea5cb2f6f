"""How good a scorer is at telling the preferred of two apart: right, wrong, ties, calibration. Pure functions."""

import math
from collections.abc import Sequence
from typing import Any

BINS = 10
"""Equal bins of confidence between 1/2 and 1."""


def preference_numbers(chosen: Sequence[float], rejected: Sequence[float]) -> dict[str, Any]:
    """How often the chosen one scores higher, and how well the margin tells how sure that is.

    Ties are neither right nor wrong: an accuracy over decided pairs says little without their share.

    Args:
        chosen: scores of the preferred ones.
        rejected: scores of the others, in the same order.

    Returns:
        right, wrong, ties: pairs; coverage: share of decided pairs; accuracy: right among decided pairs (0.5 without
        any), with its Wilson interval of 95 % `accuracy_interval`; margin and margin_se: mean difference and its
        standard error; log_loss: mean of -log sigmoid(margin), nats; ece and reliability: see `reliability`.
    """
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    n = len(margins)
    right, wrong = sum(m > 0 for m in margins), sum(m < 0 for m in margins)
    mean = math.fsum(margins) / n
    table, ece = reliability(margins)
    return {
        "pairs": n,
        "right": right,
        "wrong": wrong,
        "ties": n - right - wrong,
        "coverage": (right + wrong) / n,
        "accuracy": right / (right + wrong) if right + wrong else 0.5,
        "accuracy_interval": wilson(right, right + wrong),
        "margin": mean,
        "margin_se": math.sqrt(math.fsum((m - mean) ** 2 for m in margins) / max(1, n - 1) / n),
        "log_loss": math.fsum(softplus(-m) for m in margins) / n,
        "ece": ece,
        "reliability": table,
    }


def wilson(right: int, n: int, z: float = 1.96) -> list[float]:
    """The Wilson score interval of a share (Wilson 1927); [0, 1] without observations."""
    if n == 0:
        return [0.0, 1.0]
    p, z2 = right / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def reliability(margins: Sequence[float], bins: int = BINS) -> tuple[list[dict[str, float]], float]:
    """Stated confidence against how often it was right, over decided pairs.

    The scorer prefers the higher score with the confidence sigmoid(|margin|), in [1/2, 1), as in the Bradley-Terry
    model that it is trained as.

    Returns:
        A row a bin that is not empty: `low`, `high`, mean `confidence`, `accuracy`, `pairs`; and the expected
        calibration error, the mean |accuracy - confidence| weighted by pairs (Naeini et al. 2015), 0 without any.
    """
    decided = [(1 / (1 + math.exp(-abs(m))), m > 0) for m in margins if m != 0]
    width = 0.5 / bins
    rows = []
    for index in range(bins):
        here = [pair for pair in decided if min(int((pair[0] - 0.5) / width), bins - 1) == index]
        if here:
            rows.append(
                {
                    "low": 0.5 + index * width,
                    "high": 0.5 + (index + 1) * width,
                    "confidence": math.fsum(confidence for confidence, _ in here) / len(here),
                    "accuracy": sum(is_right for _, is_right in here) / len(here),
                    "pairs": len(here),
                }
            )
    total = max(1, len(decided))
    return rows, math.fsum(row["pairs"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / total


def softplus(x: float) -> float:
    """log(1 + e^x) without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
