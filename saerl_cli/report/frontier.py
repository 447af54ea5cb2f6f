"""A run's reward-KL frontier beside its limits: figure, data and table.

frontier.csv    what frontier.svg and frontier.png show
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saerl_cli.report import figures
from saerl_cli.report.text import aligned, table_of

Rows = list[dict[str, Any]]


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


def print_table(points: Sequence[dict[str, Any]]) -> None:
    """Print a line a policy, with standard errors."""
    print(aligned(table_of(COLUMNS, points), words=0), flush=True)
