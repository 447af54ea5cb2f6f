"""`saerl evaluate`: the numbers of `rl/measuring/evaluate.py`, and the run's reward-KL frontier beside its limits.

summary.json    the numbers; frontier, an entry a policy with its efficiency; optimum, pooled_optimum, best_of_n: limits
base.jsonl      rewards of the reference's completions, a line a prompt
frontier.csv    what frontier.svg and frontier.png show
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saerl_cli.analysis.frontier import Limit, best_of_n, efficiency, kl_optimum, pooled_optimum
from saerl_cli.config.evaluate import EvaluateConfig
from saerl_cli.report import figures
from saerl_cli.report.saes import aligned
from saerl_cli.rl.evaluation.base import Base
from saerl_cli.rl.evaluation.evaluate import evaluate
from saerl_cli.run.directory import Run
from saerl_cli.run.processes import Team
from saerl_cli.run.progress import say

CURVE = 40
"""KLs at which a limit is drawn and written down."""

Rows = list[dict[str, Any]]


def work(config: EvaluateConfig, run: Run, accelerator: Any) -> float:
    """Measure, write summary.json, the figure and its data, print the frontier; returns the reward of the policy."""
    start = time.monotonic()
    found = evaluate(config, run, accelerator.device, Team(accelerator.process_index, accelerator.num_processes))
    if not run.writes:
        return found.numbers["reward_after"]
    numbers, limits = found.numbers, limits_of(found.base)
    points = [entry | shares(entry, limits) for entry in numbers["frontier"]]
    numbers |= {"frontier": points, "base_samples": samples_of(found.base), **shares(points[-1], limits)}
    numbers |= curves(limits, max(entry["kl_exact"] for entry in points))
    if len(points) > 1 or limits:
        write_frontier(run.path, "frontier", {numbers["adapter"]: [points]}, {}, numbers)
        print(aligned(table(points), words=0), flush=True)
    for warning in numbers["warnings"]:
        say(f"WARNING: {warning}")
    run.summary(numbers | {"seconds": round(time.monotonic() - start, 1)})
    return numbers["reward_after"]


# --- limits ----------------------------------------------------------------------------------------------------------


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


# --- figure and table ------------------------------------------------------------------------------------------------


def write_frontier(
    folder: Path, name: str, paths: dict[str, list[Rows]], means: dict[str, Rows], numbers: dict[str, Any]
) -> None:
    """NAME.svg and NAME.png, and what they show as NAME.csv.

    Args:
        folder: where.
        name: of the files.
        paths: method -> a list of entries a run.
        means: method -> {kl, gain, half} over seeds.
        numbers: reward_base, the limits as `curves` gave them, and a `note` where there is one.
    """
    limits = {key: numbers[key] for key in ("optimum", "pooled_optimum", "best_of_n") if key in numbers}
    note = str(numbers.get("note", "")).partition(": `")[0]  # without the command
    figure = figures.frontier(paths, means, limits, numbers["reward_base"], note)
    figures.save(figure, folder / name)
    rows = [
        {"what": method, "run": number, **{key: entry[key] for key in DRAWN}}
        for method, runs in paths.items()
        for number, points in enumerate(runs)
        for entry in points
    ]
    rows += [{"what": f"{method} (mean)", **point} for method, points in means.items() for point in points]
    rows += [{"what": limit, **point} for limit, points in limits.items() for point in points]
    figures.write_csv(folder / f"{name}.csv", rows)


DRAWN = ("step", "kl_exact", "kl_exact_se", "reward", "reward_se", "gain", "gain_se")
"""What the figure shows of a policy."""

COLUMNS = (
    ("step", "step", "{:,}"),
    ("factor", "factor", "{:g}"),
    ("reward", "reward", "{:.3f}"),
    ("gain", "gain", "{:.3f}"),
    ("KL, nats", "kl_exact", "{:.3f}"),
    ("KL (k1)", "kl", "{:.3f}"),
    ("efficiency", "efficiency", "{:.1%}"),
    ("at least", "efficiency_bound", "{:.1%}"),
    ("held-out loss", "nll_heldout", "{:.3f}"),
    ("length", "length", "{:.1f}"),
)
"""Heading, key, format."""


def table(points: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A heading and a line a policy, as text; with standard errors."""
    columns = [column for column in COLUMNS if any(column[1] in point for point in points)]
    return [[heading for heading, _, _ in columns], *([cell(p, key, form) for _, key, form in columns] for p in points)]


def cell(numbers: dict[str, Any], key: str, form: str) -> str:
    """A number with its standard error where there is one; a dash where it is not to be had."""
    if numbers.get(key) is None:
        return "–"
    error = numbers.get(f"{key}_se")
    return form.format(numbers[key]) + ("" if error is None else f" ± {form.format(error)}")
