"""What `saerl compare` compares: finished runs of `saerl evaluate`; where a folder has none, policies as they ended.

A finished run of `saerl rlhf` has measured its own policy: one point of a frontier, on the held-out prompts of its own
settings with random numbers of its own seed. Evaluations measure alike, along the way too, and are taken where there
are any. Reads run directories only; imports no torch.
"""

import glob
import hashlib
import json
import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from saerl_cli.config import flat
from saerl_cli.config.evaluate import EvaluateConfig
from saerl_cli.rl.evaluation.base import difference, measured_by
from saerl_cli.rl.results import Point, known
from saerl_cli.rl.runs import run_config, snapshot_files
from saerl_cli.run.directory import Run, shown, true_status
from saerl_cli.run.files import read_json
from saerl_cli.run.sweep_table import RECORD
from saerl_cli.run.words import as_override

OWN = ("samples", "seed", "prompts")
"""In what final policies may differ from each other and from evaluations; a note says so."""
OF_PROMPTS = ("data.", "model.", "prompts.", "algo.max_new_tokens", "evaluation.samples")
"""Settings, or their beginnings, that decide a training run's held-out prompts."""
FINAL = ("reward_before", "reward_before_se", "reward_after", "reward_se", "kl", "kl_se", "kl_exact", "kl_exact_se")
"""What a finished run's summary.json says of its policy."""


@dataclass
class Evaluation:
    """A finished run of `saerl evaluate`, or all of a method and seed; or a policy as its own training measured it."""

    path: Path
    settings: dict[str, Any]
    """Of the training run, {dotted key: value}."""
    frontier: list[Point]
    """Its policies, the finished one last."""
    measured: dict[str, Any]
    """What two evaluations must share to be comparable (`saerl_cli.rl.evaluation.base.measured_by`)."""
    reward_base: float
    """Mean reward of the reference."""
    adapter: str
    policy: str
    """The training run."""
    trainable_parameters: int | None
    group: str = ""
    """Runs of one group share base model, reward and prompts; all runs are one group unless told otherwise."""
    final: bool = False
    """Whether training measured it: a single point."""

    @property
    def unit(self) -> tuple[Any, str]:
        """Seed and group: what the runs of a method differ in."""
        return self.settings.get("seed"), self.group

    @property
    def points(self) -> list[dict[str, float]]:
        """Its policies as {kl, gain, gain_se}."""
        return [{"kl": p.kl_exact, "gain": p.gain, "gain_se": p.gain_se} for p in self.frontier]

    @property
    def reach(self) -> float:
        """The largest KL that was measured, nats."""
        return max(point["kl"] for point in self.points)


@dataclass
class Selection:
    """What is compared, and what a reader must know of it."""

    evaluations: list[Evaluation]
    note: str = ""
    """What final policies are; empty where there are only evaluations."""
    left_out: list[str] = field(default_factory=list)
    """A sentence each."""


@dataclass
class Folder:
    """Run directories that a word stands for."""

    word: str
    evaluations: list[Path]
    finished: list[Path]
    """Of `saerl rlhf`."""
    unfinished: list[Path]
    """Of `saerl rlhf`."""


def choose(words: Sequence[str], across: Sequence[str] = ()) -> Selection:
    """The measurements that folders, sweeps and globs stand for, each once; grouped by what may differ (`across`).

    Raises:
        ValueError: one that is missing, unfinished or not comparable with the first; the message names it.
    """
    folders = [folder_of(word) for word in words]
    measured = [load(path) for path in dict.fromkeys(path for folder in folders for path in folder.evaluations)]
    known = {Path(e.policy).resolve() for e in measured}
    bare = [folder for folder in folders if not folder.evaluations]
    finals = [path for path in once(path for folder in bare for path in folder.finished) if path.resolve() not in known]
    evaluations = [*measured, *map(load_final, finals)]
    refuse_incomparable(evaluations, across)
    for evaluation in evaluations:
        evaluation.group = json.dumps([evaluation.measured.get(key) for key in sorted(across)]) if across else ""
    left = []
    passed = once(path for f in folders if f.evaluations for path in f.finished if path.resolve() not in known)
    if passed:
        left.append(f"left out, since nothing has evaluated them: {listed(passed)}; `{evaluate_command(passed)}` does")
    if stopped := once(path for folder in bare for path in folder.unfinished):
        left.append(f"left out, not finished: {listed(stopped)}")
    return Selection(evaluations, note_of(evaluations), left)


def once(paths: Iterable[Path]) -> list[Path]:
    """Paths without repetition."""
    return list(dict.fromkeys(paths))


def listed(paths: Sequence[Path]) -> str:
    """Runs by name, with their status where they have not finished."""
    statuses = {path: true_status(run := Run(path), run.record) for path in paths}
    return ", ".join(f"{path}" + (f" ({s})" if s != "completed" else "") for path, s in statuses.items())


# --- finding runs ----------------------------------------------------------------------------------------------------


def folder_of(word: str) -> Folder:
    """Run directories that a word stands for.

    Raises:
        ValueError: it is no folder, or holds nothing that could be compared.
    """
    records: dict[Path, dict[str, Any]] = {}
    for folder in [Path(path) for path in sorted(glob.glob(word))] or [Path(word)]:
        if not folder.exists():
            raise ValueError(f"runs: there is no folder {folder}")
        records |= {file.parent: Run(file.parent).record for file in sorted(folder.rglob("run.json"))}
    trained = {path: record.get("status") for path, record in records.items() if record.get("job") == "rlhf"}
    found = Folder(
        word,
        [path for path, record in records.items() if record.get("job") == "evaluate"],
        [path for path, status in trained.items() if status == "completed"],
        [path for path, status in trained.items() if status != "completed"],
    )
    if not found.evaluations and not found.finished:
        if not found.unfinished:
            raise ValueError(f"runs: {word} holds no run of `saerl evaluate` and none of `saerl rlhf`")
        raise ValueError(
            f"runs: {word} holds no finished run of `saerl evaluate` or `saerl rlhf`, only"
            f" {listed(found.unfinished)}; finish it first: {resuming(found.unfinished[0])}"
        )
    return found


def resuming(path: Path) -> str:
    """The command that finishes a run: of a sweep's point that of the sweep."""
    sweep = path.parent / RECORD
    return str((read_json(sweep) if sweep.is_file() else Run(path).record).get("command"))


def load(path: Path) -> Evaluation:
    """A finished evaluation."""
    run = Run.load(path)
    if run.status != "completed":
        raise ValueError(f"{path} is {run.status}; finish it first: {run.record.get('command')}")
    summary = run.read_summary()
    if "measured" not in summary or "trained_with" not in run.record:
        raise ValueError(f"{path} was written by an earlier version without a frontier; evaluate its policy again")
    return read_evaluation(path, summary, run.record["trained_with"])


def read_evaluation(path: Path, summary: Mapping[str, Any], settings: dict[str, Any]) -> Evaluation:
    """Read what a comparison needs of the summary.json of an evaluation.

    Raises:
        ValueError: it was written by another version.
    """
    return Evaluation(
        path,
        settings,
        [known(Point, entry, path) for entry in summary["frontier"]],
        summary.get("measured") or {},
        summary.get("reward_base", summary.get("reward_before", 0.0)),
        str(summary.get("adapter", "")),
        str(summary.get("policy", "")),
        summary.get("trainable_parameters"),
    )


def load_final(path: Path) -> Evaluation:
    """A finished run of `saerl rlhf` as a frontier of one point.

    The error of its gain takes the two means as independent, which is too large rather than too small: policy and
    reference answered the same prompts.
    """
    numbers = Run.load(path).read_summary()
    if missing := [key for key in FINAL if key not in numbers]:
        raise ValueError(
            f"{path} was written by another version without {missing[0]}; measure it: {evaluate_command([path])}"
        )
    trained = run_config(path)
    settings = flat(Run(path).settings)
    own = EvaluateConfig(policy=str(path), evaluation=trained.evaluation, seed=trained.seed)
    prompts = json.dumps({k: v for k, v in settings.items() if k.startswith(OF_PROMPTS)}, sort_keys=True)
    point = {key: numbers[key] for key in (*FINAL[3:], "changed", "nonzero") if key in numbers} | {
        "step": numbers.get("steps", 0),
        "reward": numbers["reward_after"],
        "gain": numbers["reward_after"] - numbers["reward_before"],
        "gain_se": math.hypot(numbers["reward_se"], numbers["reward_before_se"]),
    }
    measured = measured_by(own, trained) | {"prompts": f"own {hashlib.sha256(prompts.encode()).hexdigest()}"}
    facts = {"policy": str(path), "reward_base": numbers["reward_before"], "frontier": [point], "measured": measured}
    return replace(read_evaluation(path, numbers | facts, settings), final=True)


# --- what may be compared --------------------------------------------------------------------------------------------


def refuse_incomparable(evaluations: Sequence[Evaluation], across: Sequence[str]) -> None:
    """Refuse measurements of another model, reward, reference, or ways of sampling than the first.

    Raises:
        ValueError: the message names both and what differs.
    """
    for other in evaluations[1:]:
        first, may_differ = evaluations[0], {*across, *(OWN if other.final else ())}
        one, two = ({k: v for k, v in e.measured.items() if k not in may_differ} for e in (first, other))
        if differs := difference(one, two):
            raise ValueError(
                f"{other.path} was measured with {differs} than {first.path}; only runs of one model, reward,"
                " prompts and sampling can be compared, unless across=[...] names what may differ"
            )


def note_of(evaluations: Sequence[Evaluation]) -> str:
    """What must be known of final policies: on which prompts and seeds they stand, and what measures them alike."""
    finals = [e for e in evaluations if e.final]
    if not finals:
        return ""
    measure = f": `{evaluate_command([e.path for e in finals])}`"
    if len(finals) < len(evaluations):
        names = ", ".join(str(e.path) for e in finals)
        return f"{names}: final policies only, on other prompts and random numbers than the evaluations{measure} helps"
    prompts, seeds = ({json.dumps(e.measured[key]) for e in finals} for key in ("prompts", "seed"))
    where = "each on its own run's prompts" if len(prompts) > 1 else "all on the same held-out prompts"
    numbers = ", each with its own seed" if len(seeds) > 1 else ""
    return f"final policies only, as training measured them, {where}{numbers}{measure} gives the frontier"


def evaluate_command(policies: Sequence[Path]) -> str:
    """The whole command that measures policies alike, with those on the way to them."""
    paths = [str(shown(path)) for path in policies]
    kept = all(snapshot_files(path) for path in policies)
    how = "snapshots=true" if kept else "factors=[0.25,0.5,0.75]"
    values = ",".join(as_override("policy", path).partition("=")[2] for path in paths)
    if len(paths) == 1:
        return shlex.join(["saerl", "evaluate", f"policy={values}", how])
    sweep = os.path.commonpath(paths) or "runs/evaluated"
    words = ["-m", f"policy={values}", how, as_override("hydra.sweep.dir", f"{sweep}-eval")]
    return shlex.join(["saerl", "evaluate", *words])
