"""`saerl compare`: methods at equal KL, from runs of `saerl evaluate`, or from policies as training measured them.

summary.json    methods {name: {runs, trainable_parameters, nonzero, seconds, ...}}, table, the limits, and in `note`
                what must be known of final policies
table.csv       a line a method and KL
costs.csv       a line a method: numbers trained, seconds, peak memory, where its training ended
figure.csv      what figure.svg and figure.png show
sparsity.csv    what sparsity.svg and sparsity.png show, where there are coefficients
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saerl_cli.analysis.compare import (
    Method,
    baseline_of,
    common_kls,
    costs,
    mean_curve,
    methods_of,
    row,
)
from saerl_cli.analysis.frontier import t_interval
from saerl_cli.analysis.measured import Evaluation, choose
from saerl_cli.config.compare import CompareConfig
from saerl_cli.report import figures
from saerl_cli.report.frontier import Limits, curves, limits_of, write_frontier
from saerl_cli.report.saes import aligned
from saerl_cli.rl.evaluation import base
from saerl_cli.run.directory import Run
from saerl_cli.run.files import read_jsonl
from saerl_cli.run.progress import say

COLUMNS = (
    ("method", "method", "{}"),
    ("seeds", "runs", "{}"),
    ("measured", "measured", "{}"),
    ("trainable", "trainable_parameters", "{:,}"),
    ("nonzero", "nonzero", "{:,.0f}"),
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
    ("nonzero", "nonzero", "{:,.0f}"),
    ("seconds", "seconds", "{:.0f}"),
    ("peak memory, MiB", "peak_memory_mib", "{:,.0f}"),
    ("final gain", "gain", "{:.3f}"),
    ("final KL, nats", "kl", "{:.3f}"),
)
"""The same, of what methods cost and where they ended."""


def check(config: CompareConfig) -> None:
    """Refuse runs that are missing, unfinished or not comparable.

    Raises:
        ValueError: one line saying what is wrong.
    """
    methods = methods_of(choose(config.paths(), config.across).evaluations, config)
    baseline_of(methods, config.baseline)
    if config.kls is None:
        common_kls(methods)


def work(config: CompareConfig, run: Run) -> None:
    """Compare; write summary.json, table.csv and the figure, print the table."""
    chosen = choose(config.paths(), config.across)
    evaluations, methods = chosen.evaluations, methods_of(chosen.evaluations, config)
    baseline = baseline_of(methods, config.baseline)
    groups = {group: [e for e in evaluations if e.group == group] for group in sorted({e.group for e in evaluations})}
    limits = {group: found for group, members in groups.items() if (found := best_limits(members))}
    kls = config.kls or common_kls(methods)
    facts = {method.name: facts_of(method) for method in methods}
    rows = [
        row(method, kl, baseline, {group: limit.optimum for group, limit in limits.items()})
        | {key: facts[method.name][key] for key in ("trainable_parameters", "nonzero", "measured")}
        for kl in kls
        for method in methods
    ]
    bases = [members[0].summary["reward_base"] for members in groups.values()]
    reward_base = sum(bases) / len(bases)
    numbers = {"reward_base": reward_base, "baseline": baseline and baseline.name, "methods": facts, "table": rows}
    numbers |= {"note": chosen.note, "left_out": chosen.left_out}
    numbers |= {"groups": len(groups), "measured": [members[0].summary["measured"] for members in groups.values()]}
    numbers |= mean_curves([curves(found, reach_of(evaluations)) for found in limits.values()])
    paths = {drawn_name(method): [shown(run, reward_base) for run in method.runs] for method in methods}
    means = {drawn_name(method): mean for method in methods if (mean := mean_curve(method))}
    write_frontier(run.path, "figure", paths, means, numbers)
    figures.write_csv(run.path / "table.csv", rows)
    cost_rows = [{"method": name, **{key: fact.get(key) for _, key, _ in COSTS[1:]}} for name, fact in facts.items()]
    figures.write_csv(run.path / "costs.csv", cost_rows)
    write_sparsity(run.path, methods)
    run.update(inputs={"runs": [str(evaluation.path) for evaluation in evaluations]})
    run.summary(numbers)
    show(rows, methods, bool(limits))
    halves = {name: {key: fact[key] for key in ("gain_half", "kl_half")} for name, fact in facts.items()}
    print_table(COSTS, [line | halves[line["method"]] for line in cost_rows])
    for sentence in filter(None, (chosen.note, *chosen.left_out)):
        say(sentence)


def write_sparsity(folder: Path, methods: Sequence[Method]) -> None:
    """Gain against the number of coefficients that are not exactly untouched, of every policy that has any."""
    points = [
        {"method": method.name, "seed": run.settings.get("seed"), **{key: p[key] for key in SPARSITY}}
        for method in methods
        for run in method.runs
        for p in run.summary["frontier"]
        if p.get("nonzero")
    ]
    if points:
        figures.save(figures.sparsity(points), folder / "sparsity")
        figures.write_csv(folder / "sparsity.csv", points)


SPARSITY = ("step", "nonzero", "gain", "gain_se", "kl_exact", "kl_exact_se")
"""What is written of a policy beside the sparsity figure."""


def measured_as(method: Method) -> str | None:
    """`final policy` where a run of the method is a single point that training measured; None else."""
    return "final policy" if any(run.final for run in method.runs) else None


def drawn_name(method: Method) -> str:
    """What the figure calls a method."""
    found = measured_as(method)
    return f"{method.name} ({found})" if found else method.name


def reach_of(evaluations: Sequence[Evaluation]) -> float:
    """The largest KL that was measured, nats."""
    return max(evaluation.reach for evaluation in evaluations)


def shown(run: Evaluation, reward_base: float) -> list[dict[str, Any]]:
    """The policies of a run, their rewards as gains over the mean base."""
    return [point | {"reward": reward_base + point["gain"]} for point in run.summary["frontier"]]


def mean_curves(found: Sequence[dict[str, list[dict[str, Any]]]]) -> dict[str, list[dict[str, Any]]]:
    """Limits averaged over groups, KL by KL; reliable where all of them are."""
    if len(found) < 2:
        return found[0] if found else {}
    curves = {}
    for name in found[0]:
        columns = zip(*(limits[name] for limits in found), strict=False)
        curves[name] = [{key: sum(p[key] for p in points) / len(points) for key in points[0]} for points in columns]
        for point in curves[name]:
            point |= {"reliable": point["reliable"] == 1} if "reliable" in point else {}
    return curves


def best_limits(evaluations: Sequence[Evaluation]) -> Limits | None:
    """The limits from the run with the most base samples: they share model, reward and prompts."""
    drawn = [read_jsonl(evaluation.path / base.FILE) for evaluation in evaluations]
    return limits_of(max(drawn, key=lambda lines: len(lines[0]["rewards"]) if lines else 0))


def facts_of(method: Method) -> dict[str, Any]:
    """A method's runs and final policies, as plain data."""
    last = [run.summary["frontier"][-1] for run in method.runs]
    nonzero = [point["nonzero"] for point in last if "nonzero" in point]
    gain, kl = t_interval([point["gain"] for point in last]), t_interval([point["kl_exact"] for point in last])
    cost = costs(method)
    return {
        "adapter": method.runs[0].summary["adapter"],
        "measured": measured_as(method),
        "runs": [str(run.path) for run in method.runs],
        "seeds": [run.settings.get("seed") for run in method.runs],
        "trainable_parameters": method.runs[0].summary["trainable_parameters"],
        "nonzero": sum(nonzero) / len(nonzero) if nonzero else None,
        "gain": gain.mean,
        "gain_half": gain.half,
        "kl": kl.mean,
        "kl_half": kl.half,
        "seconds": cost["seconds"],
        "peak_memory_mib": cost["peak_memory_bytes"] and cost["peak_memory_bytes"] / 2**20,
    }


def show(rows: Sequence[dict[str, Any]], methods: Sequence[Method], limits: bool) -> None:
    """Print the table and how to read it."""
    print_table(COLUMNS, rows)
    say("± half a 95 % interval: over seeds (Student's t), of a single run over its samples; p is not corrected")
    if not limits:
        say("no base samples: evaluate one of the runs with base_samples=64 for the KL-optimal policy")
    alone = [method.name for method in methods if len(method.runs) == 1]
    if alone:
        say(f"WARNING: one seed of {', '.join(alone)} says nothing about other seeds")


def print_table(wanted: Sequence[tuple[str, str, str]], rows: Sequence[dict[str, Any]]) -> None:
    """Rows as aligned text, without columns that none of them has."""
    columns = [column for column in wanted if any(entry[column[1]] is not None for entry in rows)]
    lines = [[heading for heading, _, _ in columns]]
    lines += [[cell(entry, key, form) for _, key, form in columns] for entry in rows]
    print(aligned(lines, words=1), flush=True)


def cell(entry: dict[str, Any], key: str, form: str) -> str:
    """A number with half its interval; a dash for what is not to be had."""
    if key == "gain" and entry["gain"] is None and "reached" in entry:
        return f"not reached ({entry['reached']} of {entry['runs']})"
    if entry[key] is None:
        return "–"
    half = entry.get(f"{key}_half")
    return form.format(entry[key]) + (f" ± {form.replace('+', '').format(half)}" if half else "")
