"""What a report shows, as plain data: the page's JSON is this and nothing else."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from saerl_cli.analysis.behaviour import gold_parts, one_feature, proxy_and_gold
from saerl_cli.config.adapter import MOVED
from saerl_cli.report.collect import MEASURED, POLICY, RunFiles, owner
from saerl_cli.rl.evaluation.behaviour import BEATEN, REWARD_ALONE, beaten, constants, warnings_of

VALUES = 300_000
"""Numbers of learning curves in a page, at most; long runs are thinned beyond that."""
FEW = 12
"""So many runs are shown one by one, with all their metrics; more are shown by method, with the main ones."""
TEXT = 3_000_000
"""Characters of samples in a page, at most; beyond that fewer steps are shown."""
LONGEST = 1200
"""Characters of a prompt or completion."""

COLUMNS = (
    ("seed", "seed", None, "int", "of training"),
    ("trainable", "trainable_parameters", None, "int", "numbers that training may change"),
    ("reward", "reward_after", "reward_before", "number", "untouched model, policy, on the same held-out prompts"),
    ("KL, nats", "kl", None, "number", "of a completion, policy from untouched model, k1 on fresh samples"),
    ("efficiency", "efficiency", None, "share", "gain as a share of the KL-optimal policy's at the same KL"),
    ("curse words", "curse_share_after", "curse_share_before", "share", "share of all words: untouched model, policy"),
    ("held-out loss", "nll_heldout_after", "nll_heldout_before", "number", "nats a token: untouched model, policy"),
    ("tokens", "length_after", "length_before", "number", "of a completion: untouched model, policy"),
    ("seconds", "seconds", None, "int", "of training"),
)
"""Heading, key of summary.json, key of the untouched model's, how it is written, what it is."""
ERRORS = {
    "reward_before": "reward_before_se",
    "reward_after": "reward_se",
    "kl": "kl_se",
    "efficiency": "efficiency_se",
}
"""Numbers shown with half their 95 % interval."""
OF_TRAINING = ("seconds", "trainable_parameters")
"""Taken from the training run even where fresh samples were drawn."""

STOPPED = {
    "failed": "this run failed: what it left is shown, what is missing is listed under Provenance",
    "interrupted": "this run was interrupted: what it left is shown, what is missing is listed under Provenance",
    "killed": "this run was killed: what it left is shown, what is missing is listed under Provenance",
}
"""What is said of runs that did not end well."""
RANKS = {BEATEN: 1, REWARD_ALONE: 4}
"""Beginning of a warning -> its place: 1 is shown in red, 2 is usual, 4 is a note at the end."""
EARLIER = "a constant string gets reward"
"""How earlier versions began the sentence on a constant, whose verdict they took on the reward alone."""

METRICS = {
    "reward": ("reward", "mean over a phase's completions"),
    "eval_reward": ("reward, held-out prompts", "the same prompts and random numbers at every look"),
    "kl": ("KL, nats", "log pi - log pi_ref of a completion, mean over a phase (k1)"),
    "eval_kl": ("KL, held-out prompts, nats", "k1 on the completions of a look"),
    "kl_exact": ("KL, whole vocabulary, nats", "KL of every next-token distribution along completions, summed"),
    "length": ("tokens a completion", "mean over a phase"),
    "ended": ("share that ended", "completions with an end token"),
    "entropy": ("entropy, nats a token", "of the policy's next-token distribution"),
    "reward_std": ("spread of the reward", "standard deviation over a phase"),
    "reward_kurtosis": ("excess kurtosis of the reward", "0 for a normal distribution; large where few rewards rule"),
    "reward_hill": ("Hill index of the reward", "tail index of the largest tenth; variance is infinite below 2"),
    "reward_top_share": ("largest reward's share", "of all that exceeds the median of a phase"),
    "loss": ("loss", "what the optimiser minimises"),
    "kl_coef": ("beta", "weight of the KL"),
    "approx_kl": ("KL of an update", "new policy from the one that sampled, k3"),
    "clip_fraction": ("clipped share", "tokens whose ratio was clipped"),
    "explained_variance": ("explained variance", "of the returns, by the value head"),
    "value_loss": ("value loss", ""),
    "grad_norm": ("gradient norm", "of the trained parameters"),
    "nonzero": ("coefficients not exactly 1", ""),
    "changed": ("moved coefficients", f"|c - 1| > {MOVED:g}"),
    "delta_norm": ("norm of delta", "over all coefficients"),
    "delta_max": ("largest |delta|", ""),
    "lr": ("learning rate", ""),
    "fvu": ("SAE: FVU", "share of variance that the SAE leaves unexplained"),
    "l0": ("SAE: L0", "features active per token"),
    "dead": ("SAE: dead share", "features that have not fired for long"),
}
"""Key of metrics.jsonl -> label, meaning; in the order of the menu. Others follow under their own names."""
MAIN = 12
"""Metrics of METRICS that are kept where there are many runs."""


def content(runs: Sequence[RunFiles], frontiers: list[dict[str, Any]], command: str) -> dict[str, Any]:
    """Everything the page shows."""
    policies = [run for run in runs if run.job == POLICY]
    shown = [*policies, *(run for run in runs if run.job in MEASURED and owner(run, policies) is None)]
    newest = {run.name: measurement(run, runs) for run in shown}
    compared = [run for run in runs if run.job == "compare" and run.summary.get("table")]
    rest = [run for run in runs if run not in shown and run.job not in (*MEASURED, "compare")]
    parts = {
        "features": each(runs, "features.json", features_of),
        "audits": each(runs, "audit.json", audit_of),
        "behaviour": each(shown, "the behaviour", lambda run: behaviour_of(run, newest[run.name], runs)),
        "gold": each(shown, "the gold reward", gold_of),
        "comparisons": each(compared, "summary.json", comparison),
        "others": each(rest, "summary.json", other),
        "provenance": each(runs, "run.json", provenance),
    }
    flags = [
        flag for found in each(shown, "the warnings", lambda run: warnings(run, newest[run.name])) for flag in found
    ]
    flags += [{"run": run.name, "text": STOPPED[run.status], "rank": 3} for run in runs if run.status in STOPPED]
    return parts | {
        "title": title(shown, runs),
        "few": FEW,
        "findings": each(shown, "the numbers", lambda run: finding(run, newest[run.name])) if len(shown) <= 4 else [],
        "warnings": sorted(flags, key=lambda flag: flag["rank"]),
        "numbers": numbers_table(shown, newest),
        "curves": curves([run for run in runs if run.metrics]),
        "frontiers": frontiers,
        "samples": samples(sorted((run for run in runs if run.samples), key=lambda run: run.job != POLICY)),
        "detectors": [list(detector) for detector in DETECTORS],
        "missing": [{"run": run.name, "path": str(run.path), "text": text} for run in runs for text in run.missing],
        "command": command,
        "version": next((v for run in runs if (v := (run.record.get("versions") or {}).get("saerl"))), ""),
    }


def each(runs: Sequence[RunFiles], what: str, function: Callable[[RunFiles], Any]) -> list[Any]:
    """What a function makes of each run, as far as it makes anything of it.

    Files of another version may be JSON of any shape: such a run is listed as lacking `what`, and the page goes on.
    """
    found = []
    for run in runs:
        try:
            part = function(run)
        except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
            run.missing.append(f"{what} cannot be shown, another version of saerl may have written it ({error!r})")
            continue
        if part:
            found.append(part)
    return found


def measurement(run: RunFiles, runs: Sequence[RunFiles]) -> RunFiles | None:
    """The latest finished evaluation of a policy; itself where the policy's own run is not there."""
    if run.job == "evaluate":
        return run
    own = [r for r in runs if r.job == "evaluate" and r.summary and owner(r, [run]) is run and r.name == run.name]
    return max(own, key=lambda r: str(r.record.get("started", "")), default=None)


def numbers_of(run: RunFiles, measured: RunFiles | None) -> dict[str, Any]:
    """A policy's numbers: those of fresh samples where there are some, its cost from training."""
    fresh = measured.summary if measured else {}
    cost = {key: run.summary[key] for key in OF_TRAINING if run.job == POLICY and key in run.summary}
    seen_again = ("behaviour", "warnings") if "behaviour" in fresh else ()
    own = {k: v for k, v in run.summary.items() if k not in seen_again}
    return own | fresh | cost


# --- head ------------------------------------------------------------------------------------------------------------


def title(shown: Sequence[RunFiles], runs: Sequence[RunFiles]) -> str:
    """The page's heading."""
    if len(shown) == 1:
        return f"RLHF run {shown[0].path.name}"
    if shown:
        return "What RLHF taught" if len(shown) <= FEW else f"What RLHF taught in {len(shown)} runs"
    return (
        f"{len(runs)} runs of saerl" if len(runs) > 1 else f"saerl {runs[0].job.replace('_', '-')} {runs[0].path.name}"
    )


def finding(run: RunFiles, measured: RunFiles | None) -> str:
    """The result in a sentence; empty where there is none."""
    s = numbers_of(run, measured)
    if not all(isinstance(s.get(key), int | float) for key in ("reward_before", "reward_after", "reward_se", "kl")):
        return ""
    trained = s.get("trainable_parameters")
    text = (
        f"{run.name}: " + (f"{trained:,} trainable numbers took" if trained else "training took") + f" the reward from"
        f" {s['reward_before']:.3f} to {s['reward_after']:.3f} (± {1.96 * s['reward_se']:.3f})"
        f" at {s['kl']:.2f} nats per completion."
    )
    gone = s.get("curse_removed")
    return text + (f" {gone:.0%} of the curse words are gone." if isinstance(gone, float) and gone > 0 else "")


def warnings(run: RunFiles, measured: RunFiles | None) -> list[dict[str, Any]]:
    """What a reader must know before believing a policy's numbers, the worst first: {run, text, rank}."""
    s, own, found = numbers_of(run, measured), run.summary, []
    if run.job == POLICY and own and not own.get("frozen_unchanged", True):
        found.append(("a frozen weight changed; nothing on this page can be trusted", 0))
    texts = dict.fromkeys(said(s))
    if measured not in (None, run):  # its tricks were seen again on fresh samples, with other numbers
        tricks = {*warnings_of(own)} if "behaviour" in s else set()
        texts |= dict.fromkeys(w for w in said(own) if w not in tricks)
    found += [(text, RANKS.get(text.split(":")[0], 2)) for text in texts]
    return [{"run": run.name, "text": text, "rank": rank} for text, rank in found]


def said(numbers: Mapping[str, Any]) -> list[str]:
    """The warnings of a summary; those that follow from its numbers where an earlier version wrote none or others."""
    written = numbers.get("warnings") or []
    if "behaviour" not in numbers:
        return [*written, *warnings_of(numbers)]
    return [*(w for w in written if not w.startswith(EARLIER)), *constants(numbers["behaviour"])]


def numbers_table(shown: Sequence[RunFiles], newest: Mapping[str, RunFiles | None]) -> dict[str, Any]:
    """The headline numbers, a row a policy: columns {label, form, help}, rows {..., cells}.

    A cell is [value, half its 95 % interval, the untouched model's]. A column that no run has is left out.
    """
    numbers = {run.name: numbers_of(run, newest[run.name]) | {"seed": run.seed} for run in shown}
    columns = [c for c in COLUMNS if any(isinstance(numbers[run.name].get(c[1]), int | float) for run in shown)]
    rows = []
    for run in shown:
        own = numbers[run.name]
        cells = [
            [number(own.get(key)), half_interval(own, key), before and number(own.get(before))]
            for _, key, before, *_ in columns
        ]
        fresh = newest[run.name]
        rows.append(
            {
                "run": run.name,
                "group": run.group,
                "status": run.status,
                "measured": f"{fresh.path.name}, seed {fresh.record.get('seed')}" if fresh else "end of training",
                "beaten": beaten(own.get("behaviour") or {}),
                "cells": cells,
            }
        )
    return {"columns": [{"label": c[0], "form": c[3], "help": c[4]} for c in columns], "rows": rows}


def half_interval(numbers: Mapping[str, Any], key: str) -> float | None:
    """Half the 95 % interval of a number, where its standard error is known."""
    error = number(numbers.get(ERRORS.get(key, "")))
    return None if error is None else 1.96 * error


def number(value: Any) -> float | int | None:
    """A finite number, shortened to six digits; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


# --- curves ----------------------------------------------------------------------------------------------------------


def curves(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Learning curves: metrics [{key, label, help}], series [{run, group, seed, steps, values: {key: [...]}}]."""
    series = [part for run in runs for part in series_of(run)]
    present = dict.fromkeys(key for part in series for key in part["values"])
    keys = [key for key in METRICS if key in present]
    keys += sorted(key for key in present if key not in METRICS) if len(series) <= FEW else []
    keys = keys if len(series) <= FEW else keys[:MAIN]
    most = max(40, min(500, VALUES // max(1, len(series) * len(keys))))
    thinned = False
    for part in series:
        kept = thin(len(part["steps"]), most)
        thinned |= len(kept) < len(part["steps"])
        part["steps"] = [part["steps"][i] for i in kept]
        part["values"] = {k: [part["values"][k][i] for i in kept] for k in keys if k in part["values"]}
    labels = [{"key": k, "label": METRICS.get(k, (k, ""))[0], "help": METRICS.get(k, (k, ""))[1]} for k in keys]
    return {"metrics": labels, "series": series, "thinned": most if thinned else None}


def series_of(run: RunFiles) -> list[dict[str, Any]]:
    """The curves of a run; of SAE training one an SAE."""
    head = {"group": run.group, "seed": run.seed, "steps": [line["step"] for line in run.metrics]}
    keys = dict.fromkeys(key for line in run.metrics for key in line if key not in ("step", "phase"))
    if run.job != "train_sae":
        values = {key: [number(line.get(key)) for line in run.metrics] for key in keys}
        return [{"run": run.name, **head, "values": with_numbers(values)}]
    saes = dict.fromkeys(key.rsplit("/", 1)[0] for key in keys if "/" in key)
    found = []
    for sae in saes:
        own = {key: [number(line.get(f"{sae}/{key}")) for line in run.metrics] for key in ("fvu", "l0", "dead")}
        found.append({"run": f"{run.name} {sae}", **head, "values": with_numbers(own)})
    return found


def with_numbers(values: dict[str, list]) -> dict[str, list]:
    """Those columns that hold a number."""
    return {key: column for key, column in values.items() if any(value is not None for value in column)}


def thin(count: int, most: int) -> list[int]:
    """Places of at most so many points, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


# --- samples ---------------------------------------------------------------------------------------------------------


def samples(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """Completions by run and step: {run, job, steps: [{step, rows: [[prompt, completion, reward, kl], ...]}]}."""
    budget = TEXT // max(1, len(runs))
    found = []
    for run in runs:
        by_step: dict[float, list] = {}
        for line in run.samples:
            row = [str(line["prompt"])[:LONGEST], str(line.get("completion", ""))[:LONGEST]]
            by_step.setdefault(line["step"], []).append([*row, number(line.get("reward")), number(line.get("kl"))])
        steps = [{"step": step, "rows": rows} for step, rows in sorted(by_step.items())]
        size = sum(len(row[0]) + len(row[1]) for step in steps for row in step["rows"])
        kept = thin(len(steps), max(2, int(len(steps) * min(1, budget / max(1, size)))))
        part = {"run": run.name, "job": run.job, "steps": [steps[i] for i in kept]}
        found.append(part | ({"left_out": len(steps) - len(kept)} if len(kept) < len(steps) else {}))
    return found


# --- features and audit ----------------------------------------------------------------------------------------------


def features_of(run: RunFiles) -> dict[str, Any] | None:
    """The features of a policy whose coefficient moved: columns site, feature, delta; `cards` by place in them."""
    if not run.features:
        return None
    if not {"features", "deltas"} & set(run.features):
        raise KeyError("deltas")
    listed = [f for f in run.features.get("features") or [] if isinstance(f, dict) and "site" in f and "feature" in f]
    deltas = run.features.get("deltas") or {}
    places = {(f["site"], f["feature"]): f for f in listed}
    sites = list(dict.fromkeys([*deltas, *(site for site, _ in places)]))
    rows = [(f["site"], f["feature"], f.get("delta", 0.0)) for f in listed]
    rows += [
        (site, i, delta)
        for site, values in deltas.items()
        for i, delta in enumerate(values)
        if delta and (site, i) not in places
    ]
    if not rows:
        return None
    total = sum(map(len, deltas.values())) or len(rows)
    return {
        "run": run.name,
        "sites": sites,
        "site": [sites.index(site) for site, _, _ in rows],
        "feature": [feature for _, feature, _ in rows],
        "delta": [number(delta) for _, _, delta in rows],
        "cards": [cleaned(f) for f in listed],
        "total": total,
        "moved": sum(abs(delta) > MOVED for values in deltas.values() for delta in values),
    }


def audit_of(run: RunFiles) -> dict[str, Any] | None:
    """What audit.json says, as far as it is understood."""
    audit = run.audit
    if audit is None:
        return None
    reverts = [line for line in audit.reverts if isinstance(line, dict)]
    curves = {
        name: [{k: number(point.get(k)) for k in ("n", "share", "share_se")} for point in points]
        for name, points in audit.curves.items()
        if isinstance(points, list) and points and isinstance(points[0], dict) and "share" in points[0]
    }
    if not reverts and not curves:
        raise KeyError("reverts")
    return cleaned(
        {
            "run": run.name,
            "gain": audit.gain,
            "completeness": audit.completeness,
            "features": audit.features,
            "needed": audit.needed,
            "reverts": reverts,
            "curves": curves,
            "command": run.record.get("command", ""),
        }
    )


# --- behaviour -------------------------------------------------------------------------------------------------------


DETECTORS = (
    ("tokens", "length", 1, "of a completion"),
    ("distinct-1", "distinct_1", 3, "distinct tokens over all"),
    ("distinct-2", "distinct_2", 3, "distinct bigrams over all"),
    ("repetition", "repetition", 3, "bigrams of a completion that stood in it before"),
    ("commonest", "commonest", 3, "share of the completion written most often"),
    ("entropy", "token_entropy", 2, "of the tokens of all completions, nats"),
    ("top token", "top_token", 3, "share of the token written most often"),
    ("kurtosis", "kurtosis", 1, "excess kurtosis of the rewards"),
    ("Hill index", "hill", 2, "tail index of the largest tenth of the rewards; infinite variance below 2"),
)
"""Heading, key, digits, meaning."""


def behaviour_of(run: RunFiles, measured: RunFiles | None, runs: Sequence[RunFiles]) -> dict[str, Any] | None:
    """Detectors before and after, what one token and one feature explain, the constants."""
    s = numbers_of(run, measured)
    found = s.get("behaviour") or {}
    cells = []
    for _, key, _, _ in DETECTORS:
        pair = []
        for when in ("before", "after"):
            part = found.get(when) or {}
            values = {**part, **(part.get("tail") or {}), "top_token": (part.get("top_token") or {}).get("share")}
            pair.append(number(s.get(f"{key}_{when}", values.get(key))))
        cells.append(pair)
    if not any(value is not None for pair in cells for value in pair):
        return None
    audits = [r.audit for r in runs if r.audit and r.name == run.name]
    return cleaned(
        {
            "run": run.name,
            "cells": cells,
            "commonest_text": (found.get("after") or {}).get("commonest_text"),
            "top_token": ((found.get("after") or {}).get("top_token") or {}).get("text"),
            "one_token": found.get("one_token"),
            "one_feature": one_feature(audits[-1]) if audits else None,
            "baselines": found.get("baselines"),
            "beaten": beaten(found),
        }
    )


def gold_of(run: RunFiles) -> dict[str, Any] | None:
    """Proxy and gold reward over training, where something is held out."""
    parts = gold_parts(run.settings)
    lines = proxy_and_gold(run.metrics, parts)
    if not lines:
        return None
    kept = [lines[i] for i in thin(len(lines), 200)]
    columns = {key: [number(line[key]) for line in kept] for key in ("step", "kl", "proxy", "gold")}
    return {"run": run.name, "parts": list(parts), **columns}


# --- the rest --------------------------------------------------------------------------------------------------------


def comparison(run: RunFiles) -> dict[str, Any]:
    """The table of a run of `saerl compare`."""
    keys = (
        "method",
        "measured",
        "runs",
        "kl",
        "gain",
        "gain_half",
        "difference",
        "difference_half",
        "efficiency",
        "efficiency_half",
    )
    rows = [{key: line.get(key) for key in keys} for line in run.summary["table"]]
    return cleaned({"run": str(run.path), "rows": rows} | {k: run.summary.get(k) for k in ("baseline", "note")})


def other(run: RunFiles) -> dict[str, Any]:
    """A run that is no policy: its job, status and plain numbers; of SAEs a line each."""
    parts = run.summary.get("saes") or {"": run.summary}
    lines = [
        {
            "name": name,
            **{k: v for k, v in numbers.items() if isinstance(v, str | int | float) and not isinstance(v, bool)},
        }
        for name, numbers in parts.items()
        if isinstance(numbers, dict)
    ]
    return cleaned({"run": run.path.name, "job": run.job.replace("_", "-"), "status": run.status, "lines": lines})


def provenance(run: RunFiles) -> dict[str, Any]:
    """Everything needed to repeat a run."""
    facts = {k: v for k, v in run.record.items() if k not in ("command", "trainable", "trained_with")}
    return {
        "run": run.name,
        "path": str(run.path),
        "job": run.job.replace("_", "-"),
        "status": run.status,
        "frozen": run.record.get("frozen_unchanged"),
        "command": str(run.record.get("command", "")),
        "facts": json.dumps(facts, indent=1, ensure_ascii=False),
        "config": run.config,
    }


def cleaned(value: Any) -> Any:
    """Plain data with its numbers shortened, None for those that are not finite."""
    if isinstance(value, dict):
        return {str(key): cleaned(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(inner) for inner in value]
    if isinstance(value, float):
        return number(value)
    return value
