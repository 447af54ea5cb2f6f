"""What no policy can pass, from samples of the reference, and a policy's share of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from saerl_cli.analysis.frontier import Limit, best_of_n, efficiency, kl_optimum, pooled_optimum
from saerl_cli.rl.evaluation.base import Base
from saerl_cli.run.progress import say

CURVE = 40
"""KLs at which a limit is drawn and written down."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Limits:
    """What no policy can pass, from samples of the reference."""

    optimum: Limit
    pooled: Limit
    best: Rows
    """Best-of-n."""


def limits_of(base: Base) -> Limits | None:
    """The limits; None without base samples, or where the reward tells none of them apart."""
    if not base:
        return None
    rewards = np.array([line["rewards"] for line in base], dtype=np.float64)  # [prompts, samples]
    try:
        return Limits(kl_optimum(rewards), pooled_optimum(rewards), best_of_n(rewards))
    except ValueError as error:
        say(f"WARNING: no limits: {error}")
        return None


def samples_of(base: Base) -> int:
    """Base samples a prompt."""
    return len(base[0]["rewards"]) if base else 0


def shares(entry: dict[str, Any], limits: Limits | None) -> dict[str, float | None]:
    """Efficiency of a policy: its gain as a share of the KL-optimal policy's, None where that is not to be had.

    `efficiency_bound` is the same against the limit with pooled prompts, which reaches further: it is too small.
    """
    if limits is None:
        return {}
    at = (entry["gain"], entry["gain_se"], entry["kl_exact"], entry["kl_exact_se"])
    found: dict[str, float | None] = {}
    for name, limit in (("efficiency", limits.optimum), ("efficiency_bound", limits.pooled)):
        share = efficiency(*at, limit)
        found |= {name: share and share.value, f"{name}_se": share and share.se}
    return found


def curves(limits: Limits | None, reach: float) -> dict[str, Rows]:
    """The limits from KL 0 to a little beyond `reach`, as plain data."""
    if limits is None:
        return {}
    kls = [1.1 * max(reach, 0.01) * (i / CURVE) ** 2 for i in range(CURVE + 1)]  # dense where the limit is steep
    return {
        "optimum": [curve_point(limits.optimum, kl) for kl in kls],
        "pooled_optimum": [curve_point(limits.pooled, kl) for kl in kls],
        "best_of_n": limits.best,
    }


def curve_point(limit: Limit, kl: float) -> dict[str, Any]:
    """The limit at a KL, as plain data."""
    point = limit.at(kl)
    numbers = {"kl": kl, "gain": point.gain, "gain_se": point.gain_se, "ess": point.ess}
    return numbers | {"reliable": point.reliable}


def mean_curves(found: Sequence[dict[str, Rows]]) -> dict[str, Rows]:
    """Limits averaged over groups, KL by KL; reliable where all of them are."""
    if len(found) < 2:
        return found[0] if found else {}
    means = {}
    for name in found[0]:
        columns = zip(*(limits[name] for limits in found), strict=False)
        means[name] = [{key: sum(p[key] for p in points) / len(points) for key in points[0]} for points in columns]
        for point in means[name]:
            point |= {"reliable": point["reliable"] == 1} if "reliable" in point else {}
    return means
