"""The figures of a report, as matplotlib figures that read well on light and dark pages."""

import csv
import io
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from saerl_cli.run.files import partial_name, write_text

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
def curves_of(
    series: Sequence[dict[str, Any]],
    quantities: Sequence[tuple[str, str]] = (
        ("reward", "reward"),
        ("kl", "KL, nats per completion"),
        ("length", "tokens per completion"),
        ("fvu", "FVU"),
    ),
) -> Figure | None:
    """One panel a quantity over steps, one line a run; a colour a run, or a method where there are many.

    Args:
        series: {run, group, steps, values: {key: [...]}} as `saerl_cli.report.content.curves` gives them.
        quantities: (key, axis label); those that no run has are left out.
    """
    quantities = [pair for pair in quantities if any(pair[0] in part["values"] for part in series)]
    if not quantities:
        return None
    figure = Figure(figsize=(4.2 * len(quantities), 2.9), layout="constrained")
    panels = list(figure.subplots(1, len(quantities), squeeze=False)[0])
    word = "run" if len(series) <= len(COLOURS) else "group"
    colours = dict(zip(dict.fromkeys(part[word] for part in series), cycle(), strict=False))
    for panel, (key, label) in zip(panels, quantities, strict=True):
        drawn: set[str] = set()
        for part in series:
            points = [(x, y) for x, y in zip(part["steps"], part["values"].get(key, ()), strict=False) if y is not None]
            if points:
                name = None if part[word] in drawn else part[word].lstrip("_")
                drawn.add(part[word])
                panel.plot(*zip(*points, strict=True), color=colours[part[word]], label=name, lw=1.4)
        panel.set(xlabel="step", ylabel=label)
    legend_outside(figure, panels)
    return figure


@styled
def panel(part: dict[str, Any]) -> Figure:
    """Reward over sequence KL, as `saerl_cli.report.panels.frontiers` gives it."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    word = "run" if len(part["series"]) <= len(COLOURS) else "group"
    colours = dict(zip(dict.fromkeys(s[word] for s in part["series"]), cycle(), strict=False))
    means = {mean["group"] for mean in part["means"]}
    for series in part["series"]:
        colour, drawn = colours[series[word]], axes.get_legend_handles_labels()[1]
        if series["path"]:
            axes.plot(*zip(*series["path"], strict=True), color=colour, alpha=0.3, lw=1)
        points = sorted(series["points"], key=lambda p: p["kl"])
        label = series[word].lstrip("_")
        axes.errorbar(
            [p["kl"] for p in points],
            [p["reward"] for p in points],
            xerr=[1.96 * p["kl_se"] for p in points],
            yerr=[1.96 * p["reward_se"] for p in points],
            fmt="." if series["group"] in means else "o-",
            color=colour,
            ms=4,
            lw=1.2,
            elinewidth=0.7,
            alpha=0.45 if series["group"] in means else 1,
            label=None if label in drawn else label,
        )
    for mean in part["means"]:
        colour = colours.get(mean["group"], GREY)
        axes.plot([p["kl"] for p in mean["points"]], [p["reward"] for p in mean["points"]], color=colour, lw=1.8)
    right = 1.08 * max((p["kl"] for s in part["series"] for p in s["points"]), default=1.0)
    base = part["base_reward"] or 0.0
    draw_limits(axes, {k: part.get(k) or [] for k in ("optimum", "pooled_optimum", "best_of_n")}, base, right)
    axes.set(xlabel="sequence KL from the base model, nats per completion", ylabel="reward")
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    legend_outside(figure, [axes])
    return figure


@styled
def keep_curves(curves: dict[str, list[dict[str, Any]]]) -> Figure | None:
    """Share of the gain that is left over the number of features kept or removed, a line a way of choosing them."""
    if not curves:
        return None
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for colour, (name, points) in zip(cycle(), curves.items(), strict=False):
        points = [p for p in points if p["n"] is not None and p["share"] is not None]
        errors = [1.96 * (p["share_se"] or 0) for p in points]
        label, places = name.replace("_", " "), [p["n"] for p in points]
        axes.errorbar(
            places, [p["share"] for p in points], yerr=errors, fmt="o-", color=colour, ms=3, lw=1.2, label=label
        )
    axes.set(xlabel="features", ylabel="share of the gain")
    axes.set_xscale("symlog", linthresh=1)
    axes.legend()
    return figure


@styled
def proxy_against_gold(part: dict[str, Any]) -> Figure:
    """The reward that is optimised and the one it stands for, over KL."""
    figure = Figure(figsize=(5.4, 2.9), layout="constrained")
    axes = figure.subplots()
    for colour, key in zip(COLOURS, ("proxy", "gold"), strict=False):
        axes.plot(part["kl"], part[key], ".-", color=colour, label=key)
    axes.set(xlabel="KL, nats per completion", ylabel="reward")
    axes.legend()
    return figure


@styled
def frontier(
    paths: dict[str, list[list[dict[str, Any]]]],
    means: dict[str, list[dict[str, Any]]],
    limits: dict[str, list[dict[str, Any]]],
    base_reward: float,
    note: str = "",
) -> Figure:
    """Reward over KL: a colour a method, the KL-optimal policy and best-of-n in grey, all starting at the base model.

    Args:
        paths: method -> a list a run of policies {kl_exact, kl_exact_se, reward, reward_se}, drawn with 95 % intervals
            where the method has no mean, else as faint points.
        means: method -> {kl, gain, half}: mean over seeds and half its interval (None: one seed).
        limits: optimum and pooled_optimum, {kl, gain, reliable}; best_of_n, {n, kl, gain}; any may be missing.
        base_reward: mean reward of the base model.
        note: what must be known of the points, above the figure.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    if note:
        axes.set_title(textwrap.fill(note, 100), fontsize=8, loc="left", parse_math=False)
    for index, (colour, (method, runs)) in enumerate(zip(cycle(), paths.items(), strict=False)):
        mean, line = means.get(method), ("-", "--", ":")[index // len(COLOURS) % 3]
        for number, points in enumerate(runs):
            draw_path(axes, points, base_reward, colour, None if mean or number else method, faint=bool(mean))
        if mean:
            kls, rewards = [p["kl"] for p in mean], [base_reward + p["gain"] for p in mean]
            axes.plot(kls, rewards, line, color=colour, lw=1.8, label=method)
    right = 1.08 * max(point["kl_exact"] for runs in paths.values() for points in runs for point in points)
    draw_limits(axes, limits, base_reward, right)
    bounds = axes.get_ylim()  # a band of two seeds would push everything else together
    for colour, method in zip(cycle(), paths, strict=False):
        draw_band(axes, means.get(method, []), base_reward, colour)
    axes.set(ylim=bounds)
    axes.set(xlabel="sequence KL from the base model, nats per completion", ylabel="reward", xlim=(0, right or None))
    legend_outside(figure, [axes])
    return figure


def draw_path(
    axes: Any, points: Sequence[dict[str, Any]], base_reward: float, colour: str, label: str | None, faint: bool
) -> None:
    """The policies of one run in order of KL, from the base model on."""
    path = sorted(points, key=lambda point: point["kl_exact"])
    kls, rewards = [0.0, *(p["kl_exact"] for p in path)], [base_reward, *(p["reward"] for p in path)]
    if faint:
        axes.plot(kls[1:], rewards[1:], ".", color=colour, alpha=0.35, ms=4)
        return
    axes.errorbar(
        kls,
        rewards,
        xerr=[0.0, *(1.96 * p["kl_exact_se"] for p in path)],
        yerr=[0.0, *(1.96 * p["reward_se"] for p in path)],
        fmt="o-",
        color=colour,
        ms=4,
        lw=1.4,
        elinewidth=0.8,
        label=label,
        zorder=3,
    )


def draw_band(axes: Any, mean: Sequence[dict[str, Any]], base_reward: float, colour: str) -> None:
    """The interval around the mean over seeds."""
    middle = [base_reward + p["gain"] for p in mean]
    low, high = ([r + sign * (p["half"] or 0.0) for r, p in zip(middle, mean, strict=True)] for sign in (-1, 1))
    axes.fill_between([p["kl"] for p in mean], low, high, color=colour, alpha=0.18, lw=0)


def draw_limits(axes: Any, limits: dict[str, list[dict[str, Any]]], base_reward: float, right: float) -> None:
    """The KL-optimal policy, dotted where its estimate is unreliable; its bound; best-of-n up to a KL."""
    styles = {"optimum": ("-", 1.8, "KL-optimal policy"), "pooled_optimum": ("--", 1.0, "bound: prompts chosen too")}
    for name, (form, width, label) in styles.items():
        points = limits.get(name, [])
        kls, rewards = [p["kl"] for p in points], [base_reward + p["gain"] for p in points]
        sure = next((i for i, p in enumerate(points) if not p["reliable"]), len(points))
        axes.plot(kls[:sure], rewards[:sure], form, color=GREY, lw=width, label=label) if sure else None
        if name == "optimum" and sure < len(points):
            start = max(sure - 1, 0)
            axes.plot(kls[start:], rewards[start:], ":", color=GREY, lw=1, label="the same, too few samples")
    best = [point for point in limits.get("best_of_n", []) if 0 < point["kl"] < 0.97 * right]
    if best:
        axes.plot([p["kl"] for p in best], [base_reward + p["gain"] for p in best], "x", color=GREY, label="best of n")
        for point in best:
            place = (point["kl"], base_reward + point["gain"])
            axes.annotate(f"{point['n']}", place, (4, -10), textcoords="offset points", fontsize=8, color=GREY)


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


KEEP_LINES = {
    "keep": ("the first n by attribution", COLOURS[0], "o-"),
    "keep_by_effect": ("the first n by effect", COLOURS[3], "s-"),
    "remove": ("all but the first n", COLOURS[1], "o-"),
    "keep_random": ("n at random", GREY, "x--"),
    "keep_matched": ("n others of like effect", GREY, "d:"),
}
"""Curves of an audit: label, colour, marker and line."""


@styled
def keep_only(curves: dict[str, list[dict[str, Any]]], needed: dict[str, dict[str, Any] | None]) -> Figure:
    """Share of the reward gain that is left over the number of features kept, with 95 % intervals.

    Args:
        curves: name in `KEEP_LINES` -> points {n, share, share_se}.
        needed: per cent of the gain -> {n, low, high}, drawn on its level.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        label, colour, form = KEEP_LINES[name]
        shares, errors = [p["share"] for p in points], [1.96 * p["share_se"] for p in points]
        numbers = [p["n"] for p in points]
        axes.errorbar(numbers, shares, errors, fmt=form, color=colour, label=label, ms=4, lw=1.4, elinewidth=0.8)
    for percent, entry in needed.items():
        if entry:
            place, text = (entry["n"], float(percent) / 100), f"{percent} %: {entry['n']:,}"
            axes.annotate(text, place, (-4, 7), textcoords="offset points", ha="right", fontsize=8, color=COLOURS[0])
    axes.axhline(1, color=GREY, lw=0.8, alpha=0.5)
    axes.set(xlabel="features n", ylabel="share of the reward gain that is left", xscale="log")
    log_axis(axes.xaxis, [1, max(point["n"] for points in curves.values() for point in points)])
    axes.margins(y=0.08)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def attributions(rows: Sequence[dict[str, Any]], shares: dict[str, dict[str, dict[str, float]]]) -> Figure:
    """Attribution of the first features, and the share of all attribution by kind, with 95 % intervals.

    Args:
        rows: {name, label, attribution, attribution_se, rewarded}.
        shares: title -> name -> {share, share_se, effect_share, features}.
    """
    heights = [max(2, len(rows)), *(max(2, len(entries)) for entries in shares.values())]
    figure = Figure(figsize=(7.2, 0.2 * sum(heights) + len(heights)), layout="constrained")
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    colours = [COLOURS[0] if row["rewarded"] else GREY for row in rows]
    names = [f"{row['name']}  {row['label']}" for row in rows]
    bars(panels[0], names, [r["attribution"] for r in rows], [r["attribution_se"] for r in rows], colours)
    panels[0].set(xlabel="attributed reward (teal: fires on rewarded tokens)")
    for panel, (title, entries) in zip(panels[1:], shares.items(), strict=True):
        names = [f"{name} ({entry['features']:,})" for name, entry in entries.items()]
        values, errors = [e["share"] for e in entries.values()], [e["share_se"] for e in entries.values()]
        bars(panel, names, values, errors, [COLOURS[2]] * len(names))
        expected = [entry["effect_share"] for entry in entries.values()]
        panel.plot(expected, range(len(names)), "|", color=COLOURS[1], ms=10, mew=2)
        panel.set(xlabel="share of the gain (red mark: of the total effect)")
        panel.set_title(title, fontsize=10, color=GREY, loc="left")
    return figure


def bars(panel: Any, names: Sequence[str], values: Sequence[float], errors: Sequence[float], colours: Any) -> None:
    """Horizontal bars, the first on top."""
    panel.barh(range(len(names)), values, xerr=[1.96 * e for e in errors], color=colours, ecolor=GREY, height=0.7)
    panel.set_yticks(range(len(names)), names, fontsize=8)
    for label in panel.get_yticklabels():
        label.set_parse_math(False)
    panel.invert_yaxis()
    panel.grid(False, axis="y")


@styled
def sparsity(points: Sequence[dict[str, Any]]) -> Figure:
    """Draw the gain against the number of coefficients that moved: a colour a method, a point a policy.

    Args:
        points: {method, changed, gain, kl_exact}; the larger the KL, the larger the point.
    """
    figure = Figure(figsize=(5.8, 3.8), layout="constrained")
    axes = figure.subplots()
    most = max(point["kl_exact"] for point in points) or 1.0
    for colour, method in zip(cycle(), dict.fromkeys(point["method"] for point in points), strict=False):
        own = [point for point in points if point["method"] == method]
        sizes = [10 + 50 * max(point["kl_exact"], 0) / most for point in own]
        counts, gains = [point["changed"] for point in own], [point["gain"] for point in own]
        axes.scatter(counts, gains, s=sizes, color=colour, alpha=0.7, lw=0, label=method)
    axes.set(xlabel="coefficients that moved (area: KL)", ylabel="reward gain", xscale="log")
    log_axis(axes.xaxis, [point["changed"] for point in points])
    legend_outside(figure, [axes])
    return figure


CONTROL_MARKERS = {"real": "d", "shuffled": "x", "random": "*", "wrong_layer": "^"}
"""Controls of `saerl_cli.sae.controls`, in grey beside the SAEs."""


@styled
def sae_frontier(points: Sequence[dict[str, Any]], label: str, log: bool) -> Figure:
    """A metric of SAEs over their L0 with 95 % intervals: a panel a site, a line a group, controls in grey.

    Args:
        points: {site, group, control, l0, l0_se, value, value_se}; `group` is an architecture, where `control` is None.
        label: of the metric.
        log: whether its axis is logarithmic, where all values are positive.
    """
    sites = list(dict.fromkeys(point["site"] for point in points))
    figure, panels = grid(len(sites), 3, (4.2, 3.2))
    groups = list(dict.fromkeys(point["group"] for point in points if point["control"] is None))
    colours = dict(zip(groups, cycle(), strict=False))
    for panel, site in zip(panels, sites, strict=True):
        here = [point for point in points if point["site"] == site]
        for group in groups:
            line = sorted((p for p in here if p["group"] == group and p["control"] is None), key=lambda p: p["l0"])
            interval_points(panel, line, colours[group], "o-", group)
        for control, marker in CONTROL_MARKERS.items():
            interval_points(
                panel, [p for p in here if p["control"] == control], GREY, marker, control.replace("_", " ")
            )
        panel.set(xlabel="L0, active features per token", ylabel=label)
        panel.set_title(site, fontsize=10, color=GREY, parse_math=False)
        if log and all(point["value"] > 0 for point in here):
            panel.set_yscale("log")
            log_axis(panel.yaxis, [point["value"] for point in here])
        if all(point["l0"] > 0 for point in here):
            panel.set_xscale("log")
            log_axis(panel.xaxis, [point["l0"] for point in here])
    legend_outside(figure, panels)
    return figure


def log_axis(axis: Any, values: Sequence[float]) -> None:
    """Plain numbers on a logarithmic axis, more of them where the values span little."""
    narrow = max(values) < 5 * min(values)
    axis.set_major_locator(LogLocator(subs=range(1, 10) if narrow else (1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def interval_points(panel: Any, points: Sequence[dict[str, Any]], colour: str, form: str, label: str) -> None:
    """Points with 95 % intervals both ways, where their standard errors are known; nothing when there are none."""
    if points:
        panel.errorbar(
            [point["l0"] for point in points],
            [point["value"] for point in points],
            xerr=[1.96 * (point["l0_se"] or 0) for point in points],
            yerr=[1.96 * (point["value_se"] or 0) for point in points],
            fmt=form,
            color=colour,
            ms=5,
            lw=1.2,
            capsize=2,
            label=label,
        )


@styled
def densities(histograms: dict[str, dict[str, list[float]]]) -> Figure:
    """How often features fire, a panel an SAE: features over log10 of the share of tokens.

    Args:
        histograms: SAE -> {log10_edges, features}, as `saerl_cli.sae.metrics.density`.
    """
    figure, panels = grid(len(histograms), 4, (3.1, 2.2))
    for panel, (name, histogram) in zip(panels, histograms.items(), strict=True):
        panel.stairs(histogram["features"], histogram["log10_edges"], fill=True, color=COLOURS[0], alpha=0.8)
        panel.set_title(name, fontsize=9, color=GREY, parse_math=False)
        panel.set(xlabel="log10 firing rate", ylabel="features")
    return figure


def grid(number: int, across: int, size: tuple[float, float]) -> tuple[Figure, list[Any]]:
    """A figure with so many panels in rows of at most `across`, each of `size` inches."""
    across = min(across, max(number, 1))
    down = -(-number // across) or 1
    figure = Figure(figsize=(size[0] * across, size[1] * down), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for unused in panels[number:]:
        unused.remove()
    return figure, panels[:number]


def legend_outside(figure: Figure, panels: Sequence[Any]) -> None:
    """One legend of all panels below them, every label once."""
    entries: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    widest = 0.5 + 0.075 * max(map(len, entries), default=0)  # inches that the longest label takes
    columns = max(1, min(len(entries), int(figure.get_figwidth() / max(1.6, widest))))
    legend = figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)
    for text in legend.get_texts():
        text.set_parse_math(False)


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


def save(figure: Figure, path: Path) -> None:
    """PATH.svg, and PATH.png on white for pages that show no SVG."""
    write_text(path.with_suffix(".svg"), svg(figure))
    partial = partial_name(path.with_suffix(".png"))
    with rc_context(STYLE):
        figure.savefig(partial, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    partial.replace(path.with_suffix(".png"))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as CSV, with the union of their keys as columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
