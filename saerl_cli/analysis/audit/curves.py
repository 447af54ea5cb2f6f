"""What is left of the gain when only some features are kept, or removed: curves, and controls of as many others."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from saerl_cli.analysis.audit.variants import Gain, Variants
from saerl_cli.rl.evaluation.measure import mean_and_error

SHARES = (0.5, 0.9, 0.99)
"""Shares of the gain whose number of features is asked for."""


def grid(total: int) -> list[int]:
    """Numbers of features at which a curve is measured: two a doubling, from 1 to all."""
    steps = {round(2 ** (k / 2)) for k in range(2 * max(1, total).bit_length())}
    return sorted({n for n in steps if n < total} | {total})


def coarse_grid(total: int) -> list[int]:
    """Numbers of features at which controls are measured: powers of 8 below all."""
    return [8**k for k in range(1, total.bit_length()) if 8**k < total]


def only(order: Sequence[int], n: int, total: int) -> Tensor:
    """The scale that keeps the first n of an order, [total]."""
    scale = torch.zeros(total)
    scale[list(order[:n])] = 1.0
    return scale


def curve(
    variants: Variants, gain: Gain, order: Sequence[int], numbers: Iterable[int], keep: bool = True
) -> list[dict]:
    """What is left of the gain when only the first n of an order are kept; with `keep` off, when they are removed."""
    total = len(order)
    points = []
    for n in numbers:
        scale = only(order, n, total)
        points.append({"n": n, **gain.kept(variants.rewards(scale if keep else 1 - scale))})
    return points


def control(
    variants: Variants, gain: Gain, choose: Callable[[int, int], list[int] | None], numbers: Iterable[int], draws: int
) -> list[dict]:
    """What is left of the gain when n features of a control are kept: mean over draws.

    Args:
        variants: measures.
        gain: of the policy.
        choose: (n, draw) -> the features kept; None where there are not enough.
        numbers: each n.
        draws: sets drawn for each n.
    """
    points, total = [], len(variants.coefficients)
    for n in numbers:
        sets = [kept for number in range(draws) if (kept := choose(n, number)) is not None]
        if not sets:
            continue
        rewards = [variants.rewards(only(kept, n, total)) for kept in sets]
        points.append({"n": n, **averaged(gain, rewards)})
    return points


def averaged(gain: Gain, rewards: Sequence[Sequence[float]]) -> dict[str, float]:
    """Gain and share of the mean over draws; errors are those over prompts and over draws together."""
    each = [gain.kept(row) for row in rewards]
    point = gain.kept([math.fsum(column) / len(column) for column in zip(*rewards, strict=True)])
    for key in ("gain", "share"):
        _, error = mean_and_error([entry[key] for entry in each])
        point[f"{key}_se"] = math.hypot(point[f"{key}_se"], error)
    _, error = mean_and_error([entry["share"] for entry in each])
    return point | {"spread": error * math.sqrt(len(each))}


def needed(points: Sequence[dict], share: float) -> dict[str, Any] | None:
    """The fewest features of a keep-only curve that carry a share of the gain; None where none does.

    Returns:
        n; low and high: the same for the upper and lower end of each point's 95 % interval (high may be None).
    """

    def first(shift: float) -> int | None:
        return next((p["n"] for p in points if p["share"] + shift * p["share_se"] >= share), None)

    n = first(0.0)
    return None if n is None else {"n": n, "low": first(1.96), "high": first(-1.96)}


# --- controls --------------------------------------------------------------------------------------------------------


def random_order(total: int, seed: int) -> list[int]:
    """All features in random order."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()


def matched(size: Sequence[float], kept: Sequence[int], seed: int, near: int = 5) -> list[int] | None:
    """As many features outside a set as it has, of like size: for each one at random of the `near` closest left.

    Args:
        size: of every feature, >= 0; compared on a logarithmic scale.
        kept: the set.
        seed: of the draw.
        near: candidates for each.

    Returns:
        None where there are fewer features outside than inside.
    """
    from bisect import bisect_left
    from random import Random

    inside, random = set(kept), Random(seed)
    left = sorted((math.log(size[i] + 1e-12), i) for i in range(len(size)) if i not in inside)
    if len(left) < len(kept):
        return None
    found = []
    for i in kept:
        wanted = math.log(size[i] + 1e-12)
        at = bisect_left(left, (wanted, -1))
        window = range(max(0, at - near), min(len(left), at + near))
        closest = sorted(window, key=lambda place: (abs(left[place][0] - wanted), place))[:near]
        found.append(left.pop(closest[random.randrange(len(closest))])[1])
    return found
