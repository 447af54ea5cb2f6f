"""The figures of a report, as matplotlib figures that read well on light and dark pages."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

COLOURS = ("#0f8a8a", "#d1623a", "#7a5bd1", "#c2972b", "#3f7fd1", "#b0447c")
"""One a run, in order: told apart on white and on black, and by readers who see fewer colours."""

GREY = "#808890"
"""Axes and text: the same contrast on light and dark."""

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.2,
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "saerl",
}


def styled(draw):  # noqa: ANN001, ANN201
    """Decorator: draw under the report's style."""

    def wrapper(*args: Any, **kwargs: Any) -> Figure:
        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


@styled
def learning_curves(curves: dict[str, list[dict[str, float]]], quantities: Sequence[tuple[str, str]]) -> Figure:
    """One panel a quantity over phases, one line a run.

    Args:
        curves: run name -> lines of its metrics.jsonl.
        quantities: (key in those lines, axis label).
    """
    figure = Figure(figsize=(4.2 * len(quantities), 2.9), layout="constrained")
    panels = figure.subplots(1, len(quantities), squeeze=False)[0]
    for panel, (key, label) in zip(panels, quantities, strict=True):
        for colour, (name, lines) in zip(cycle(), curves.items(), strict=False):
            points = [(line["phase"], line[key]) for line in lines if key in line]
            panel.plot(*zip(*points, strict=True), color=colour, label=name, lw=1.6) if points else None
        panel.set(xlabel="phase", ylabel=label)
    panels[0].legend()
    return figure


@styled
def reward_against_kl(points: dict[str, dict[str, float]], curves: dict[str, list[dict[str, float]]]) -> Figure:
    """Reward over sequence KL: the path of training, faint, and the final policy with 95 % intervals.

    Args:
        points: run name -> {reward, reward_se, kl, kl_se} measured on fresh samples.
        curves: run name -> training lines with `kl` and `reward`.
    """
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for colour, (name, point) in zip(cycle(), points.items(), strict=False):
        path = [(line["kl"], line["reward"]) for line in curves.get(name, []) if "kl" in line and "reward" in line]
        if path:
            axes.plot(*zip(*path, strict=True), color=colour, alpha=0.35, lw=1)
        axes.errorbar(
            point["kl"],
            point["reward"],
            xerr=1.96 * point["kl_se"],
            yerr=1.96 * point["reward_se"],
            color=colour,
            marker="o",
            capsize=3,
            label=name,
            zorder=3,
        )
    axes.set(xlabel="sequence KL from the base model, nats per completion", ylabel="reward")
    axes.legend(loc="lower right")
    return figure


@styled
def coefficient_ranks(deltas: dict[str, list[float]]) -> Figure:
    """Coefficients of every site by rank: how concentrated the change is.

    Args:
        deltas: site -> delta of every feature.
    """
    figure = Figure(figsize=(5.4, 2.9), layout="constrained")
    axes = figure.subplots()
    for colour, (site, values) in zip(cycle(), deltas.items(), strict=False):
        axes.plot(range(1, len(values) + 1), sorted((abs(v) for v in values), reverse=True), color=colour, label=site)
    axes.set(xlabel="features by |delta|", ylabel="|delta| = |c - 1|", xscale="log")
    axes.legend()
    return figure


def cycle() -> tuple[str, ...]:
    """Colours for as many runs as there may be."""
    return COLOURS * 20


def svg(figure: Figure) -> str:
    """A figure as an `<svg>` element, without the XML header that HTML does not want."""
    out = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue(), flags=re.DOTALL)
    return text[text.index("<svg") :]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as CSV, with the union of their keys as columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
