"""Methods at equal KL: evaluations sorted into methods, their gains with intervals over seeds.

Reads run directories only; imports no torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saerl_cli.analysis.evaluations import Evaluation, Selection
from saerl_cli.analysis.frontier import (
    Estimate,
    Interval,
    Limit,
    at_kl,
    difference_interval,
    efficiency,
    paired_interval,
    ratio_interval,
    t_interval,
)
from saerl_cli.analysis.limits import Limits, curves, limits_of, mean_curves
from saerl_cli.config.compare import CompareConfig
from saerl_cli.rl.evaluation.base import FILE
from saerl_cli.run.files import read_json, read_jsonl

KIND = "adapter.kind"
IGNORED = ("seed", "launch.", "evaluation.", "checkpoint_every", "snapshots")
"""Settings, or their beginnings, that do not make another method."""
OF_MODELS = ("model.", "data.", "adapter.saes")
"""The same where models may differ."""
MEAN_POINTS = 40
"""KLs at which a method's mean is drawn."""


@dataclass
class Method:
    """Runs that differ in their seed; with several a seed, their points together."""

    name: str
    runs: list[Evaluation]


# --- methods ---------------------------------------------------------------------------------------------------------


def methods_of(evaluations: Sequence[Evaluation], config: CompareConfig) -> list[Method]:
    """Runs by method, named; the order is that of the runs.

    Raises:
        ValueError: a setting of `by` that no run has, a label for no method, or a seed twice.
    """
    ignored = IGNORED + (OF_MODELS if "model" in config.across else ())
    settings = [{k: v for k, v in e.settings.items() if not k.startswith(ignored)} for e in evaluations]
    if config.by is not None:
        missing = [key for key in config.by if all(key not in e.settings for e in evaluations)]
        if missing:
            raise ValueError(f"by: no run has a setting {missing[0]}; write for instance by=[{KIND},adapter.lr]")
    methods: dict[str, Method] = {}
    for evaluation, own in zip(evaluations, settings, strict=True):
        alike = [other for other in settings if other.get(KIND) == own.get(KIND)]
        keys = differing(alike) if config.by is None else [key for key in config.by if key != KIND]
        name = " ".join([str(own.get(KIND)), *named(evaluation.settings, keys)])
        methods.setdefault(name, Method(name, [])).runs.append(evaluation)
    unknown = [name for name in config.labels if name not in methods]
    if unknown:
        raise ValueError(f"labels: there is no method {unknown[0]!r}; there are {', '.join(methods)}")
    for method in methods.values():
        refuse_twice(method)
        method.runs = by_seed(method.runs)
        method.name = config.labels.get(method.name, method.name)
    if len({method.name for method in methods.values()}) < len(methods):
        raise ValueError("labels: two methods have the same name; choose others")
    return list(methods.values())


def named(settings: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """Settings as `key=value`, those left empty passed over."""
    given = {key.split(".")[-1]: settings[key] for key in keys if settings.get(key) is not None}
    return [f"{key}={'+'.join(map(str, value)) if isinstance(value, list) else value}" for key, value in given.items()]


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose values are not all the same."""
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]


def refuse_twice(method: Method) -> None:
    """Refuse a run that would be counted as two seeds."""
    seen: dict[str, Evaluation] = {}
    for run in method.runs:
        same = repr(sorted((k, v) for k, v in run.settings.items() if k == "seed" or not k.startswith(IGNORED)))
        if same in seen:
            raise ValueError(
                f"{seen[same].path} and {run.path} are the same method with the same seed; leave one of them out"
            )
        seen[same] = run


def by_seed(runs: Sequence[Evaluation]) -> list[Evaluation]:
    """One entry a unit: runs that differ in a setting which `by` leaves out put their points on one frontier."""
    seeds: dict[Any, list[Evaluation]] = {}
    for run in runs:
        seeds.setdefault(run.unit, []).append(run)
    return [
        replace(
            same[0],
            frontier=[point for run in same for point in run.frontier],
            final=any(run.final for run in same),
        )
        for same in seeds.values()
    ]


def baseline_of(methods: Sequence[Method], name: str | None) -> Method | None:
    """The method whose gain counts as 100 %; None where there is no one such.

    Raises:
        ValueError: no method has that name.
    """
    if name is None:
        full = [method for method in methods if method.runs[0].settings.get(KIND) == "full"]
        return full[0] if len(full) == 1 else None
    named = [method for method in methods if method.name == name]
    if not named:
        raise ValueError(f"baseline: there is no method {name!r}; there are {', '.join(m.name for m in methods)}")
    return named[0]


# --- at equal KL -----------------------------------------------------------------------------------------------------


def common_kls(methods: Sequence[Method]) -> list[float]:
    """A quarter, half and all of the KL that every run reaches, rounded down to two digits."""
    reach = min(run.reach for method in methods for run in method.runs)
    if reach <= 0:
        raise ValueError("a run never left the base model (KL 0), so that nothing can be compared at equal KL")
    return [rounded_down(reach * share) for share in (0.25, 0.5, 1.0)]


def rounded_down(value: float, digits: int = 2) -> float:
    """A number > 0 with so many significant digits, not larger."""
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    return float(f"{math.floor(value / unit) * unit:.{digits}g}")


def gains(method: Method, kl: float) -> list[Estimate] | None:
    """The gain of each of its runs at a KL; None unless all of them reach it, so that no seed is selected."""
    found = [at_kl(run.points, kl) for run in method.runs]
    reached = [gain for gain in found if gain is not None]
    return reached if len(reached) == len(found) else None


def row(method: Method, kl: float, baseline: Method | None, limits: Mapping[str, Limit]) -> dict[str, Any]:
    """A method at a KL, as plain data.

    Args:
        method: of any number of runs.
        kl: nats.
        baseline: what it is compared with.
        limits: of each group of runs, where known.

    Returns:
        method, runs, kl, reached (runs that get there), gain, difference (gain minus the baseline's, also with `_p`,
        two-sided, not corrected for the number of comparisons), share (of the baseline's gain), efficiency (against
        the KL-optimal policy), each with `_half`, half its 95 % interval: Student's t over seeds; of a single run, for
        gain and efficiency, from its samples alone. What is not reached or not to be had is None.
    """
    reached = sum(run.reach >= kl for run in method.runs)
    numbers: dict[str, Any] = {"method": method.name, "kl": kl, "runs": len(method.runs), "reached": reached}
    own = gains(method, kl)
    theirs = gains(baseline, kl) if baseline else None
    both = ([e.value for e in own], [e.value for e in theirs]) if own and theirs and method is not baseline else None
    numbers |= interval("gain", over_seeds(own))
    difference = difference_of(method, baseline, *both) if both and baseline else None
    numbers |= interval("difference", difference) | {"difference_p": difference and difference.p}
    numbers |= interval("share", ratio_interval(*both) if both else None)
    groups = [(e, limits.get(run.group)) for e, run in zip(own or [], method.runs, strict=bool(own))]
    shares = [limit and efficiency(e.value, e.se, kl, 0.0, limit) for e, limit in groups]
    known = [e for e in shares if e is not None]
    return numbers | interval("efficiency", over_seeds(known if len(known) == len(shares) else None))


def difference_of(method: Method, baseline: Method, own: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Mean difference of two methods' runs; paired where they were run on the same of several groups."""
    units, others = [run.unit for run in method.runs], [run.unit for run in baseline.runs]
    if len({group for _, group in units}) == 1 or set(units) != set(others):
        return difference_interval(own, theirs)
    known = dict(zip(others, theirs, strict=True))
    return paired_interval(own, [known[unit] for unit in units])


# --- the comparison -------------------------------------------------------------------------------------------------


def comparison(chosen: Selection, config: CompareConfig) -> tuple[list[Method], dict[str, Any]]:
    """Compare: the methods, and the numbers of summary.json."""
    evaluations, methods = chosen.evaluations, methods_of(chosen.evaluations, config)
    baseline = baseline_of(methods, config.baseline)
    groups = {group: [e for e in evaluations if e.group == group] for group in sorted({e.group for e in evaluations})}
    limits = {group: found for group, members in groups.items() if (found := best_limits(members))}
    optima = {group: limit.optimum for group, limit in limits.items()}
    facts = {method.name: facts_of(method) for method in methods}
    rows = [
        row(method, kl, baseline, optima)
        | {key: facts[method.name][key] for key in ("trainable_parameters", "changed", "nonzero", "measured")}
        for kl in config.kls or common_kls(methods)
        for method in methods
    ]
    bases = [members[0].reward_base for members in groups.values()]
    reach = max(evaluation.reach for evaluation in evaluations)
    numbers = {
        "reward_base": sum(bases) / len(bases),
        "baseline": baseline and baseline.name,
        "methods": facts,
        "table": rows,
        "note": chosen.note,
        "left_out": chosen.left_out,
        "groups": len(groups),
        "measured": [members[0].measured for members in groups.values()],
        **mean_curves([curves(found, reach) for found in limits.values()]),
    }
    return methods, numbers


def best_limits(evaluations: Sequence[Evaluation]) -> Limits | None:
    """The limits from the run with the most base samples: they share model, reward and prompts."""
    drawn = [read_jsonl(evaluation.path / FILE) for evaluation in evaluations]
    return limits_of(max(drawn, key=lambda lines: len(lines[0]["rewards"]) if lines else 0))


def facts_of(method: Method) -> dict[str, Any]:
    """A method's runs and final policies, as plain data."""
    last = [run.frontier[-1] for run in method.runs]
    gain, kl = t_interval([point.gain for point in last]), t_interval([point.kl_exact for point in last])
    cost = costs(method)
    return {
        "adapter": method.runs[0].adapter,
        "measured": measured_as(method),
        "runs": [str(run.path) for run in method.runs],
        "seeds": [run.settings.get("seed") for run in method.runs],
        "trainable_parameters": method.runs[0].trainable_parameters,
        **{key: mean_of([getattr(point, key) for point in last]) for key in ("changed", "nonzero")},
        "gain": gain.mean,
        "gain_half": gain.half,
        "kl": kl.mean,
        "kl_half": kl.half,
        "seconds": cost["seconds"],
        "peak_memory_mib": cost["peak_memory_bytes"] and cost["peak_memory_bytes"] / 2**20,
    }


def measured_as(method: Method) -> str | None:
    """`final policy` where a run of the method is a single point that training measured; None else."""
    return "final policy" if any(run.final for run in method.runs) else None


COSTS = ("seconds", "peak_memory_bytes")
"""What training took, as a run of `saerl rlhf` ends with it."""


def costs(method: Method) -> dict[str, float | None]:
    """Mean seconds and peak memory of a method's training runs; None where they have gone since."""
    found = []
    for run in method.runs:
        file = Path(run.policy) / "summary.json"
        found.append(read_json(file) if file.is_file() else {})
    return {key: mean_of([numbers.get(key) for numbers in found]) for key in COSTS}


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean; None unless all of them are known."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def over_seeds(estimates: Sequence[Estimate] | None) -> Interval | None:
    """Mean and interval over runs; of one run the interval of its samples."""
    if not estimates:
        return None
    if len(estimates) == 1:
        return Interval(estimates[0].value, 1.96 * estimates[0].se)
    return t_interval([estimate.value for estimate in estimates])


def interval(name: str, value: Interval | None) -> dict[str, float | None]:
    """An interval as two entries."""
    return {name: value and value.mean, f"{name}_half": value and value.half}


def mean_curve(method: Method) -> list[dict[str, Any]]:
    """Mean gain over runs, {kl, gain, half}, from the base model to the KL that all of them reach; of two runs on."""
    if len(method.runs) < 2:
        return []
    reach = min(run.reach for run in method.runs)
    points = []
    for kl in [*(reach * i / MEAN_POINTS for i in range(MEAN_POINTS)), reach]:
        found = over_seeds(gains(method, kl))
        assert found is not None, "every run reaches it"
        points.append({"kl": kl, "gain": found.mean, "half": found.half})
    return points
