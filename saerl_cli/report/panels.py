"""Reward-KL frontiers of a report: a panel for all evaluations that may be compared, with their limits."""

from collections.abc import Sequence
from typing import Any

from saerl_cli.analysis.compare import Method, by_seed, mean_curve
from saerl_cli.analysis.evaluations import Evaluation, read_evaluation
from saerl_cli.report.collect import POLICY, RunFiles, owner
from saerl_cli.report.content import FEW, cleaned, number, thin
from saerl_cli.rl.evaluation.base import difference

LIMITS = ("optimum", "pooled_optimum", "best_of_n")
NEEDED = ("kl_exact", "kl_exact_se", "reward", "reward_se", "gain", "gain_se")
"""Keys of a point of a frontier."""


def frontiers(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """Panels: {title, base_reward, series, means, optimum, ..., note}, evaluations first.

    A series is a run: {run, group, seed, points: [{step, kl, kl_se, reward, reward_se}], path: [[kl, reward], ...] of
    training}; a mean is {group, points: [{kl, reward, half}]}.
    """
    policies = [run for run in runs if run.job == POLICY]
    measured = [run for run in runs if run.job == "evaluate" and has_points(run)]
    found = [panel(part, policies) for part in comparable(measured)]
    seen = {id(owner(run, policies)) for run in measured}
    rest = [run for run in policies if id(run) not in seen and final_point(run)]
    return [*found, *([at_the_end(rest)] if rest else [])]


def has_points(run: RunFiles) -> bool:
    """Whether an evaluation has a frontier that this version understands."""
    points = run.summary.get("frontier")
    return bool(points) and all(
        isinstance(p, dict) and all(number(p.get(k)) is not None for k in NEEDED) for p in points
    )


def comparable(runs: Sequence[RunFiles]) -> list[list[RunFiles]]:
    """Evaluations sorted into those of one model, reward, prompts and sampling."""
    found: list[list[RunFiles]] = []
    for run in runs:
        own = run.summary.get("measured") or {}
        place = next((part for part in found if not difference(part[0].summary.get("measured") or {}, own)), None)
        if place is None:
            found.append([run])
        else:
            place.append(run)
    return found


def panel(runs: Sequence[RunFiles], policies: Sequence[RunFiles]) -> dict[str, Any]:
    """One panel of evaluations."""
    base = runs[0].summary.get("reward_base", runs[0].summary.get("reward_before", 0.0))
    widest = max(runs, key=lambda run: run.summary.get("base_samples") or 0)
    limits = {key: widest.summary[key] for key in LIMITS if widest.summary.get(key)}
    methods = [Method(name, evaluations(runs, name)) for name in dict.fromkeys(run.group for run in runs)]
    means = [{"group": m.name, "points": mean} for m in methods if (mean := mean_curve(m))]
    series = []
    for run in runs:
        points = [
            {"step": p.get("step"), "kl": p["kl_exact"], "kl_se": p["kl_exact_se"], "reward": p["reward"]}
            | {"reward_se": p["reward_se"]}
            for p in run.summary["frontier"]
        ]
        policy = owner(run, policies)
        series.append(head(run) | {"points": points, "path": path(policy) if policy and len(runs) <= FEW else []})
    note = (
        ""
        if limits
        else "No limits: evaluate a policy with snapshots=true or base_samples=64 to draw the KL-optimal policy."
    )
    means = [
        {
            "group": m["group"],
            "points": [{"kl": p["kl"], "reward": base + p["gain"], "half": p["half"]} for p in m["points"]],
        }
        for m in means
    ]
    samples = (runs[0].summary.get("measured") or {}).get("samples", "?")
    title = f"fresh prompts, seed {runs[0].record.get('seed')}, {samples} completions a policy"
    measured = {"title": title, "base_reward": base, "series": series, "means": means, "note": note, "evaluated": True}
    command = runs[0].record.get("command", "")
    return cleaned(measured | limits | {"command": command})


def evaluations(runs: Sequence[RunFiles], group: str) -> list[Evaluation]:
    """The evaluations of a method, one a seed."""
    return by_seed([read_evaluation(run.path, run.summary, run.settings) for run in runs if run.group == group])


def head(run: RunFiles) -> dict[str, Any]:
    """What names a series."""
    return {"run": run.name, "group": run.group, "seed": run.seed}


def path(run: RunFiles) -> list[list[float]]:
    """KL and reward of the phases of training."""
    lines = [
        line for line in run.metrics if number(line.get("kl")) is not None and number(line.get("reward")) is not None
    ]
    return [[lines[i]["kl"], lines[i]["reward"]] for i in thin(len(lines), 100)]


def final_point(run: RunFiles) -> dict[str, Any] | None:
    """Reward and KL at the end of training, on the run's own held-out prompts."""
    keys = {"reward": "reward_after", "reward_se": "reward_se", "kl": "kl", "kl_se": "kl_se"}
    point = {name: number(run.summary.get(key)) for name, key in keys.items()}
    if any(value is None for value in point.values()):
        return None
    return {"step": run.metrics[-1]["step"] if run.metrics else None, **point}


def at_the_end(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """The panel of runs that nothing was evaluated of."""
    series = [head(r) | {"points": [final_point(r)], "path": path(r) if len(runs) <= FEW else []} for r in runs]
    return cleaned(
        {
            "title": "as measured at the end of training, on each run's held-out prompts",
            "base_reward": None,
            "series": series,
            "means": [],
            "evaluated": False,
            "note": "Measured by the training runs themselves; for fresh prompts, the path of training and its limits:",
            "command": f"saerl evaluate policy={runs[0].path} snapshots=true",
        }
    )
