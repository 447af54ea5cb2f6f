"""One self-contained HTML page of one or several RLHF runs: numbers, curves, features, samples, provenance."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from saerl_cli.analysis.features import describe_run, features_file
from saerl_cli.report import figures
from saerl_cli.run.files import read_json, read_jsonl, write_text

SHOWN_FEATURES = 12
SHOWN_SAMPLES = 12

NUMBERS = (
    ("trainable", "trainable_parameters", "{:,.0f}"),
    ("reward before", "reward_before", "{:.3f}"),
    ("reward after", "reward_after", "{:.3f}"),
    ("curse words before", "curse_share_before", "{:.2%}"),
    ("curse words after", "curse_share_after", "{:.2%}"),
    ("KL, nats", "kl", "{:.2f}"),
    ("held-out loss before", "nll_heldout_before", "{:.4f}"),
    ("held-out loss after", "nll_heldout_after", "{:.4f}"),
    ("seconds", "seconds", "{:.0f}"),
)
"""Column, key of summary.json, format. A column that no run has is left out."""

STANDARD_ERRORS = {"reward_after": "reward_se", "kl": "kl_se"}
"""Numbers shown with their 95 % interval."""


@dataclass
class Shown:
    """A run as the page needs it."""

    name: str
    path: Path
    record: dict[str, Any]
    """run.json"""
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    features: dict[str, Any]
    """features.json, empty for an unconstrained run."""


def write_report(runs: list[Path], out: Path | None = None) -> Path:
    """Write the page and its figures.

    Args:
        runs: run directories of `saerl rlhf`, or of `saerl demo`, which stands for the runs inside it.
        out: the file; `report.html` in the first directory when empty.

    Returns:
        The file written. Figures go to `figures/` beside it, as SVG with their data as CSV.

    Raises:
        ValueError: a directory that is no finished RLHF run.
    """
    shown = [load(path) for path in policies(runs)]
    name_apart(shown)
    out = out or runs[0] / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    drawn = draw(shown)
    save_figures(out.parent / "figures", drawn, shown)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template("page.html").render(**content(shown, {k: figures.svg(v) for k, v in drawn.items()}))
    write_text(out, page)
    return out


def policies(runs: list[Path]) -> list[Path]:
    """The RLHF runs among and inside these directories, in order."""
    found = []
    for path in runs:
        if not (path / "run.json").is_file():
            raise ValueError(f"{path} is no run directory (it has no run.json); `saerl runs` lists those there are")
        inside = sorted(child.parent for child in path.glob("*/run.json"))
        found += [child for child in (path, *inside) if read_json(child / "run.json").get("job") == "rlhf"]
    if not found:
        raise ValueError(f"{runs[0]} is no RLHF run and holds none; give a run directory of `saerl rlhf`")
    return found


def load(path: Path) -> Shown:
    """Read a finished run; `ValueError` when it has no summary."""
    if not (path / "summary.json").is_file():
        status = read_json(path / "run.json").get("status")
        raise ValueError(f"{path} is {status} and has no summary yet; repeat its command to finish it")
    features = features_file(path)
    summary = read_json(path / "summary.json")
    if not features.is_file() and (path / "adapter").is_dir() and "changed" in summary:  # it has coefficients
        describe_run(path)
    return Shown(
        name=path.name,
        path=path,
        record=read_json(path / "run.json"),
        summary=summary,
        metrics=read_jsonl(path / "metrics.jsonl"),
        samples=read_jsonl(path / "samples.jsonl"),
        features=read_json(features) if features.is_file() else {},
    )


def name_apart(shown: list[Shown]) -> None:
    """Call runs by their adapter where that tells them apart, else by their folder, else by their whole path."""
    for names in (
        [run.summary["adapter"] for run in shown],
        [run.path.name for run in shown],
        [str(run.path) for run in shown],
    ):
        if len(set(names)) == len(names):
            for run, name in zip(shown, names, strict=True):
                run.name = name
            return


# --- figures ---------------------------------------------------------------------------------------------------------


def draw(shown: list[Shown]) -> dict[str, Any]:
    """Figure name -> matplotlib figure."""
    curves = {run.name: run.metrics for run in shown}
    drawn = {
        "frontier": figures.reward_against_kl({run.name: final_point(run) for run in shown}, curves),
        "curves": figures.learning_curves(
            curves, [("reward", "reward"), ("kl", "KL, nats per completion"), ("length", "tokens per completion")]
        ),
    }
    for run in shown:
        if run.features:
            drawn[f"ranks-{run.name}"] = figures.coefficient_ranks(run.features["deltas"])
    return drawn


def final_point(run: Shown) -> dict[str, float]:
    """Reward and KL of the finished policy, with standard errors."""
    summary = run.summary
    return {
        "reward": summary["reward_after"],
        "reward_se": summary["reward_se"],
        "kl": summary["kl"],
        "kl_se": summary["kl_se"],
    }


def save_figures(folder: Path, drawn: dict[str, Any], shown: list[Shown]) -> None:
    """Every figure as SVG, and its data as CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        write_text(folder / f"{name}.svg", figures.svg(figure))
    figures.write_csv(folder / "curves.csv", [{"run": run.name, **line} for run in shown for line in run.metrics])
    figures.write_csv(folder / "frontier.csv", [{"run": run.name, **final_point(run)} for run in shown])
    for run in shown:
        if run.features:
            rows = [
                {"site": site, "feature": i, "delta": delta}
                for site, values in run.features["deltas"].items()
                for i, delta in enumerate(values)
            ]
            figures.write_csv(folder / f"ranks-{run.name}.csv", rows)


# --- content ---------------------------------------------------------------------------------------------------------


def content(shown: list[Shown], drawn: dict[str, str]) -> dict[str, Any]:
    """What the template shows; all text in it is escaped there, except the figures drawn here."""
    base = model_name(shown[0])
    columns = [c for c in NUMBERS if any(c[1] in run.summary for run in shown)]
    return {
        "title": "What RLHF taught, feature by feature" if len(shown) > 1 else f"RLHF run {shown[0].name}",
        "findings": [finding(run) for run in shown],
        "warnings": [f"{run.name}: {text}" for run in shown for text in warnings(run)],
        "caption": f"Measured when a run ends, on held-out prompts; ± half a 95 % interval. Model: {base}.",
        "columns": [column for column, _, _ in columns],
        "table": [{"name": run.name, "cells": [cell(run, key, form) for _, key, form in columns]} for run in shown],
        "frontier": drawn["frontier"],
        "curves": drawn["curves"],
        "moved": [moved(run, drawn[f"ranks-{run.name}"]) for run in shown if run.features],
        "samples": [before_and_after(run) for run in shown],
        "provenance": [provenance(run) for run in shown],
        "footer": f"Written by saerl {shown[0].record['versions'].get('saerl', '')} from the files of these runs.",
    }


def finding(run: Shown) -> str:
    """The result in a sentence."""
    s = run.summary
    text = (
        f"{run.name}: {s['trainable_parameters']:,} trainable numbers took the reward from {s['reward_before']:.3f} "
        f"to {s['reward_after']:.3f} (± {1.96 * s['reward_se']:.3f}) at {s['kl']:.2f} nats per completion."
    )
    if "cursing" in s["parts_after"] and "curse_removed" in s:
        text += f" {s['curse_removed']:.0%} of the curse words are gone."
    return text


def warnings(run: Shown) -> list[str]:
    """What a reader must know before believing the numbers."""
    s, found = run.summary, []
    if not s.get("frozen_unchanged"):
        found.append("a frozen weight changed; nothing on this page can be trusted.")
    if "length_after" in s and s["length_after"] < 0.6 * s["length_before"]:
        found.append(
            f"completions shrank from {s['length_before']:.1f} to {s['length_after']:.1f} tokens: "
            "look whether the policy only learned to stop."
        )
    if "distinct_2_after" in s and s["distinct_2_after"] < 0.6 * s["distinct_2_before"]:
        found.append(
            f"distinct bigrams fell from {s['distinct_2_before']:.2f} to {s['distinct_2_after']:.2f}: "
            "look for repetition in the samples."
        )
    return found


def cell(run: Shown, key: str, form: str) -> str:
    """A number of the table."""
    value = run.summary.get(key)
    if value is None:
        return "–"
    text = form.format(value)
    error = run.summary.get(STANDARD_ERRORS.get(key, ""))
    return f"{text} ± {1.96 * error:.3f}" if error is not None else text


def moved(run: Shown, ranks: str) -> dict[str, Any]:
    """The feature cards of a coefficient run."""
    features, deltas = run.features["features"][:SHOWN_FEATURES], run.features["deltas"]
    for feature in features:
        peak = max((value for context in feature["contexts"] for _, value in context), default=0.0)
        feature["peak"] = peak or 1.0
    total = sum(len(values) for values in deltas.values())
    half = sum(abs(v) > 0.1 for values in deltas.values() for v in values)
    return {
        "name": run.name,
        "ranks": ranks,
        "features": features,
        "summary": f"{total:,} coefficients; {half:,} moved by more than 0.1. Sorted by effect: |delta| times the "
        "feature's mean activation and decoder norm on held-out text. Labels are token statistics.",
    }


def before_and_after(run: Shown) -> dict[str, Any]:
    """Samples of the first and the last step, joined by prompt."""
    steps = sorted({sample["step"] for sample in run.samples})
    first, last = steps[0], steps[-1]
    at = {step: [s for s in run.samples if s["step"] == step] for step in (first, last)}
    rows = [
        {
            "prompt": a["prompt"],
            "before": a["completion"],
            "reward_before": a["reward"],
            "after": b["completion"],
            "reward_after": b["reward"],
        }
        for a, b in zip(at[first], at[last], strict=False)
        if a["prompt"] == b["prompt"]
    ]
    return {"name": run.name, "first": first, "last": last, "rows": rows[:SHOWN_SAMPLES]}


def model_name(run: Shown) -> str:
    """Name and revision of the base model."""
    model = run.record["inputs"]["model"]
    return " ".join(str(part) for part in (model["name"], model.get("revision")) if part)


def provenance(run: Shown) -> dict[str, Any]:
    """Everything needed to repeat the run."""
    config = run.path / ".hydra" / "config.yaml"
    facts = {k: v for k, v in run.record.items() if k not in ("command", "trainable")}
    return {
        "name": run.name,
        "status": run.record["status"],
        "restriction": "all that is frozen is unchanged"
        if run.summary.get("frozen_unchanged")
        else "frozen weights MOVED",
        "command": run.record["command"],
        "facts": json.dumps(facts, indent=2, ensure_ascii=False),
        "config": config.read_text() if config.is_file() else "",
    }
