"""`saerl demo`: the main job on the planted model, stage by stage, each stage a command that anyone can type.

language model -> SAEs -> coefficient-only PPO next to unconstrained PPO -> both on fresh prompts -> report
"""

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from saerl_cli.config.demo import DemoConfig, Scale
from saerl_cli.run import launch
from saerl_cli.run.directory import Run
from saerl_cli.run.files import read_json, read_jsonl
from saerl_cli.run.progress import say, task_bars

SMALL_MODEL = [
    "model.planted.documents=600",
    "model.planted.hidden_size=32",
    "model.planted.layers=2",
    "model.planted.heads=2",
    "model.planted.steps=60",
]
SMALL: dict[str, list[str]] = {
    "train_lm": SMALL_MODEL,
    "train_sae": [*SMALL_MODEL, "sae.tokens=40_000", "activations.buffer_tokens=8192", "sae.k=8", "eval_tokens=4_000"],
    "sparse_coeffs": [*SMALL_MODEL, "algo.phases=3", "evaluation.samples=32", "checkpoint_every=1"],
    "full": [*SMALL_MODEL, "algo.phases=3", "evaluation.samples=32", "checkpoint_every=1"],
    "evaluate": ["evaluation.samples=32"],
}
"""Words that bring every stage down to seconds."""

COLUMNS = (
    ("reward before", "reward_before", "{:.3f}"),
    ("after", "reward_after", "{:.3f}"),
    ("curse words before", "curse_share_before", "{:.2%}"),
    ("after", "curse_share_after", "{:.2%}"),
    ("removed", "curse_removed", "{:.0%}"),
    ("KL, nats", "kl", "{:.2f}"),
    ("held-out loss before", "nll_heldout_before", "{:.3f}"),
    ("after", "nll_heldout_after", "{:.3f}"),
    ("trainable", "trainable_parameters", "{:,}"),
    ("seconds", "seconds", "{:.0f}"),
)
POLICIES = ("sparse_coeffs", "full")
SAES = ["site=mlp_out", "sae.tokens=600_000"]
"""MLP outputs above layer 0, whose MLP sees the current token alone; so many tokens explain over 99 % of them."""
MEASURED = (
    *("reward_before", "reward_after", "reward_se", "kl", "kl_se", "nll_heldout_before", "nll_heldout_after"),
    *("curse_share_before", "curse_share_after", "curse_removed"),
)
"""Numbers taken from the fresh evaluation."""


@dataclass
class Stage:
    """A command of saerl that writes one run directory inside the demo's."""

    name: str
    folder: Path
    words: list[str]
    """Everything after `saerl`."""

    @property
    def typed(self) -> str:
        """What a person would type."""
        return shlex.join(["saerl", *self.words])


def stages(config: DemoConfig, out: Path) -> dict[str, Stage]:
    """The commands of the demo, by name."""
    policy = ["model=planted", "reward=cursing", "algo.phases=40", f"seed={config.seed}"]
    words = {
        "train_lm": ["train-lm", "model=planted", f"model.planted.seed={config.seed}"],
        "train_sae": ["train-sae", "model=planted", *SAES, f"seed={config.seed}", f"sae.seed={config.seed}"],
        "sparse_coeffs": ["rlhf", "--sparse-coeffs", f"adapter.saes={out / 'train_sae'}", *policy],
        "full": ["rlhf", *policy],
    }
    for name in ("train_sae", *POLICIES):
        words[name].append(f"model.planted.seed={config.seed}")
    for name in POLICIES:
        words[f"evaluate_{name}"] = ["evaluate", f"policy={out / name}", f"seed={config.seed + 1}"]
    for name, all_words in words.items():
        kind = "evaluate" if name.startswith("evaluate") else name
        all_words += SMALL[kind] if config.scale is Scale.small else []
        all_words += config.overrides.get(kind, [])
        all_words.append(f"hydra.run.dir={out / name}")
    return {name: Stage(name, out / name, all_words) for name, all_words in words.items()}


def check(config: DemoConfig) -> None:
    """Refuse overrides of a stage that does not exist."""
    unknown = sorted(set(config.overrides) - set(SMALL))
    if unknown:
        raise ValueError(f"overrides.{unknown[0]}: no such stage; stages are {', '.join(SMALL)}")


def work(config: DemoConfig, run: Run) -> float:
    """Run every stage, write summary.json and report.html, print the table.

    Returns:
        Share of curse words that coefficient-only PPO removed, in [.., 1].

    Raises:
        saerl_cli.run.launch.WorkFailed: a stage failed; its own message is above, its run directory is kept.
    """
    began = time.monotonic()
    todo = stages(config, run.path)
    one_thread = ["launch.threads=1"]
    run_stages([todo["train_lm"]])
    run_stages([todo["train_sae"]])
    run_stages([with_words(todo[name], one_thread) for name in POLICIES])  # side by side, a core each
    run_stages([with_words(todo[f"evaluate_{name}"], one_thread) for name in POLICIES])
    results = {name: result(todo[name], todo[f"evaluate_{name}"]) for name in POLICIES}
    report = write_report(run.path)
    seconds = time.monotonic() - began
    show(results, report, seconds)
    run.summary({"policies": results, "seconds": round(seconds, 1), "report": report.name})
    return results["sparse_coeffs"]["curse_removed"] or 0.0


def with_words(stage: Stage, words: list[str]) -> Stage:
    """The stage with further words."""
    return Stage(stage.name, stage.folder, [*stage.words, *words])


def result(trained: Stage, evaluated: Stage) -> dict[str, Any]:
    """Numbers of a policy: cost from its training run, behaviour from the fresh evaluation."""
    training, fresh = read_json(trained.folder / "summary.json"), read_json(evaluated.folder / "summary.json")
    cost = {key: training[key] for key in ("adapter", "trainable_parameters", "seconds", "frozen_unchanged")}
    return cost | {key: fresh.get(key) for key in MEASURED}


def write_report(out: Path) -> Path:
    """The page of the whole demo."""
    from saerl_cli.jobs.report import report

    say("report")
    return report([out], describe=True)


def show(results: dict[str, dict[str, Any]], report: Path, seconds: float) -> None:
    """The closing table, on standard output."""
    table = Table(title="RLHF against cursing, on fresh prompts", title_justify="left")
    table.add_column("", no_wrap=True)
    for name in results:
        table.add_column(name, justify="right")
    for label, key, form in COLUMNS:
        table.add_row(label, *(shown(numbers[key], form) for numbers in results.values()))
    console = Console()
    console.print(table)
    console.print(f"{seconds:.0f} s in all. Curves, features and samples: {report}", soft_wrap=True)


def shown(value: float | None, form: str) -> str:
    """A number of the table; a dash where a model wrote no curse word that could be removed."""
    return "–" if value is None else form.format(value)


# --- running stages --------------------------------------------------------------------------------------------------


def run_stages(group: list[Stage]) -> None:
    """Run stages side by side; show each command first, and the progress of its metrics while it runs."""
    for stage in group:
        say(f"$ {stage.typed}")
    children = [start(stage, quiet=len(group) > 1) for stage in group]
    try:
        if len(group) > 1:
            watch(group, children)
        codes = [child.wait() for child in children]
    finally:
        launch.stop(*children)  # an interrupted demo waits until its stages have said that they are
    for stage, code in zip(group, codes, strict=True):
        finish(stage, code)


def command(stage: Stage) -> list[str]:
    """The stage as a command of this very installation."""
    return [sys.executable, "-m", "saerl_cli.cli", *stage.words]


def start(stage: Stage, quiet: bool) -> subprocess.Popen:
    """Start a stage; `quiet` puts its messages into DEMO/STAGE.log, as two progress bars cannot share a terminal."""
    if not quiet:
        return subprocess.Popen(command(stage))
    with stage.folder.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command(stage), stdout=log, stderr=log)


def watch(group: list[Stage], children: list[subprocess.Popen]) -> None:
    """Progress of stages from the last line of their metrics, until all have ended."""
    with task_bars([stage.name for stage in group]) as update:
        while any(child.poll() is None for child in children):
            for stage in group:
                update(stage.name, *progress_of(stage))
            time.sleep(0.5)


def progress_of(stage: Stage) -> tuple[float, str]:
    """Share done and the latest numbers of a stage, from its files."""
    lines = read_jsonl(stage.folder / "metrics.jsonl")
    if not lines:
        return 0.0, ""
    last, config = lines[-1], Run(stage.folder).settings
    return last["phase"] / config.algo.phases, f"reward {last['reward']:.2f}  KL {last['kl']:.2f}"


def finish(stage: Stage, code: int) -> None:
    """Raise when a stage failed."""
    if code == 0:
        return
    log = stage.folder.with_suffix(".log")
    last = log.read_text().strip().splitlines()[-1:] if log.is_file() else []
    raise launch.WorkFailed(" ".join([f"stage {stage.name} failed (exit {code}).", *last]))
