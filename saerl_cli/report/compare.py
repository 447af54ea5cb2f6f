"""A comparison of methods at equal KL as files, figures and tables.

table.csv       a line a method and KL
costs.csv       a line a method: numbers trained, seconds, peak memory, where its training ended
figure.csv      what figure.svg and figure.png show
sparsity.csv    what sparsity.svg and sparsity.png show, where there are coefficients
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saerl_cli.analysis.compare import Method, mean_curve, measured_as
from saerl_cli.analysis.evaluations import Evaluation
from saerl_cli.report import figures
from saerl_cli.report.frontier import write_frontier
from saerl_cli.report.text import aligned, table_of
from saerl_cli.run.progress import say

COLUMNS = (
    ("method", "method", "{}"),
    ("seeds", "runs", "{}"),
    ("measured", "measured", "{}"),
    ("trainable", "trainable_parameters", "{:,}"),
    ("moved", "changed", "{:,.0f}"),
    ("KL, nats", "kl", "{:g}"),
    ("gain", "gain", "{:.3f}"),
    ("minus baseline", "difference", "{:+.3f}"),
    ("p", "difference_p", "{:.2g}"),
    ("of baseline", "share", "{:.0%}"),
    ("of optimum", "efficiency", "{:.0%}"),
)
"""Heading, key, format."""
COSTS = (
    ("method", "method", "{}"),
    ("trainable", "trainable_parameters", "{:,}"),
    ("moved", "changed", "{:,.0f}"),
    ("seconds", "seconds", "{:.0f}"),
    ("peak memory, MiB", "peak_memory_mib", "{:,.0f}"),
    ("final gain", "gain", "{:.3f}"),
    ("final KL, nats", "kl", "{:.3f}"),
)
"""The same, of what methods cost and where they ended."""


def write_comparison(folder: Path, methods: Sequence[Method], numbers: dict[str, Any]) -> None:
    """Write the tables and figures of a comparison (`saerl_cli.analysis.compare.comparison`)."""
    paths = {drawn_name(method): [shown(run, numbers["reward_base"]) for run in method.runs] for method in methods}
    means = {drawn_name(method): mean for method in methods if (mean := mean_curve(method))}
    write_frontier(folder, "figure", paths, means, numbers)
    figures.write_csv(folder / "table.csv", numbers["table"])
    keys = [*(key for _, key, _ in COSTS[1:]), "nonzero"]
    costs = [{"method": name, **{key: fact.get(key) for key in keys}} for name, fact in numbers["methods"].items()]
    figures.write_csv(folder / "costs.csv", costs)
    write_sparsity(folder, methods)


def write_sparsity(folder: Path, methods: Sequence[Method]) -> None:
    """Write the gain against the number of coefficients that moved, of every policy that has any."""
    points = [
        {"method": method.name, "seed": run.settings.get("seed"), **{key: getattr(p, key) for key in SPARSITY}}
        for method in methods
        for run in method.runs
        for p in run.frontier
        if p.changed
    ]
    if points:
        figures.save(figures.sparsity(points), folder / "sparsity")
        figures.write_csv(folder / "sparsity.csv", points)


SPARSITY = ("step", "changed", "nonzero", "gain", "gain_se", "kl_exact", "kl_exact_se")
"""What is written of a policy beside the sparsity figure."""


def drawn_name(method: Method) -> str:
    """What the figure calls a method."""
    found = measured_as(method)
    return f"{method.name} ({found})" if found else method.name


def shown(run: Evaluation, reward_base: float) -> list[dict[str, Any]]:
    """The policies of a run, their rewards as gains over the mean base."""
    return [asdict(point) | {"reward": reward_base + point.gain} for point in run.frontier]


def print_comparison(methods: Sequence[Method], numbers: dict[str, Any]) -> None:
    """Print the tables and how to read them."""
    rows = [row | ({} if row["gain"] is not None else {"gain": not_reached(row)}) for row in numbers["table"]]
    print(aligned(table_of(COLUMNS, rows, "half")), flush=True)
    say("± half a 95 % interval: over seeds (Student's t), of a single run over its samples; p is not corrected")
    if "optimum" not in numbers:
        say("no base samples: evaluate one of the runs with base_samples=64 for the KL-optimal policy")
    alone = [method.name for method in methods if len(method.runs) == 1]
    if alone:
        say(f"WARNING: one seed of {', '.join(alone)} says nothing about other seeds")
    costs = [{"method": name, **fact} for name, fact in numbers["methods"].items()]
    print(aligned(table_of(COSTS, costs, "half")), flush=True)
    for sentence in filter(None, (numbers["note"], *numbers["left_out"])):
        say(sentence)


def not_reached(row: dict[str, Any]) -> str:
    """How many of a method's runs get to a KL."""
    return f"not reached ({row['reached']} of {row['runs']})"
