"""Finding and reading the runs of a report: whatever is there, and in words what is not.

Nothing here raises for a run that failed, is running, or was written by another version: a page that says what is
missing is worth more than none. Runs are only read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saerl_cli.analysis.compare import IGNORED, differing, named
from saerl_cli.config import flat
from saerl_cli.config.renamed import translate
from saerl_cli.rl.results import AUDIT, Audit, read_audit
from saerl_cli.run.directory import Run, true_status
from saerl_cli.run.files import read_json, read_jsonl

POLICY = "rlhf"
MEASURED = ("evaluate", "audit", "features")
"""Jobs that look at a policy; their runs belong to it."""
COEFFICIENT_KEYS = ("changed", "nonzero")
"""Keys of a summary.json that only runs with coefficients have."""


@dataclass
class RunFiles:
    """A run directory as far as it can be read."""

    path: Path
    record: dict[str, Any] = field(default_factory=dict)
    """run.json"""
    summary: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the training run, {dotted key: value}."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    features: dict[str, Any] = field(default_factory=dict)
    """features.json"""
    audit: Audit | None = None
    """audit.json"""
    config: str = ""
    """.hydra/config.yaml"""
    missing: list[str] = field(default_factory=list)
    """What is not there, a sentence each."""
    name: str = ""
    group: str = ""
    """Runs that differ in their seed alone have the same."""

    @property
    def job(self) -> str:
        """Key of the command."""
        return str(self.record.get("job", "?"))

    @property
    def status(self) -> str:
        """completed, failed, interrupted, running, killed."""
        return true_status(Run(self.path, writes=False), self.record)

    @property
    def policy(self) -> str | None:
        """The policy's run directory that this run looked at."""
        found = self.record.get("inputs") or {}
        return found.get("policy") if isinstance(found, dict) else None

    @property
    def seed(self) -> Any:
        """Of training where it is known, else of the run."""
        return self.settings.get("seed", self.record.get("seed"))


# --- finding ---------------------------------------------------------------------------------------------------------


def collect(paths: Sequence[Path]) -> list[RunFiles]:
    """All runs in these folders, and those that they point to; read, named, in order.

    Raises:
        ValueError: a folder that is not there, or no run in any of them.
    """
    folders = list(dict.fromkeys(folder for path in paths for folder in run_folders(path)))
    runs = [read(folder) for folder in folders]
    known = {identity(run.record) for run in runs}
    for target in dict.fromkeys(target for run in runs for target in pointed_to(run)):
        found = identity(attempt(RunFiles(target), "run.json", read_json, {}))
        if found not in known:
            known.add(found)
            runs.append(read(target))
    runs = [run for run in runs if run.job != "demo"]  # which is made of the others
    name_apart(runs)
    return runs


def run_folders(path: Path) -> list[Path]:
    """The run directories in a folder, itself among them.

    Raises:
        ValueError: there are none.
    """
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}")
    found = sorted(file.parent for file in path.rglob("run.json") if ".hydra" not in file.parts)
    if not found:
        raise ValueError(f"{path} holds no run (no run.json in it or below); `saerl runs FOLDER` lists those there are")
    return found


def identity(record: dict[str, Any]) -> tuple[Any, ...]:
    """What a run and its copy elsewhere share."""
    return record.get("started"), record.get("command"), record.get("job")


def pointed_to(run: RunFiles) -> list[Path]:
    """Runs that a comparison or a measurement was made from, as far as they are still there."""
    inputs = run.record.get("inputs") or {}
    listed = [run.policy, *(inputs.get("runs") or [])] if isinstance(inputs, dict) else []
    return [Path(word) for word in listed if isinstance(word, str) and (Path(word) / "run.json").is_file()]


# --- reading ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> RunFiles:
    """A run, with a sentence for everything that is missing."""
    run = RunFiles(path)
    run.record = attempt(run, "run.json", read_json, {})
    run.summary = attempt(run, "summary.json", read_json, {})
    run.metrics = numbered(attempt(run, "metrics.jsonl", read_jsonl, []))
    run.samples = [line for line in attempt(run, "samples.jsonl", read_jsonl, []) if {"step", "prompt"} <= set(line)]
    run.features = attempt(run, "features.json", read_json, {})
    run.audit = attempt(run, AUDIT, read_audit, None)
    config = run.path / ".hydra" / "config.yaml"
    run.config = config.read_text(errors="replace") if config.is_file() else ""
    run.settings = settings_of(run)
    run.missing += missing_of(run)
    return run


def attempt(run: RunFiles, name: str, reader: Callable[[Path], Any], empty: Any) -> Any:
    """A file of a run; `empty`, and a sentence, where it cannot be read."""
    file = run.path / name
    if not file.is_file():
        return empty
    try:
        found = reader(file)
    except (ValueError, OSError) as error:
        run.missing.append(f"{name} cannot be read: {' '.join(str(error).split())}")
        return empty
    if empty is not None and not isinstance(found, type(empty)):
        run.missing.append(f"{name} is not what this version of saerl writes")
        return empty
    return found


def numbered(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl that say which step they are of."""
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int | float)]


def settings_of(run: RunFiles) -> dict[str, Any]:
    """The settings of training, flat."""
    if isinstance(run.record.get("trained_with"), dict):
        return translate(run.record["trained_with"])
    if run.job != POLICY or not run.config:
        return {}
    try:
        return flat(Run(run.path).settings)
    except Exception:  # of the YAML parser, which is OmegaConf's own business
        run.missing.append(".hydra/config.yaml cannot be read")
        return {}


def missing_of(run: RunFiles) -> list[str]:
    """What a finished run would have, in sentences."""
    how = f"the run is {run.status}"
    step = run.metrics[-1]["step"] if run.metrics else 0
    if run.status == "failed":
        how = f"the run failed at step {step:,}" + (f": {run.record['error']}" if run.record.get("error") else "")
    elif run.status != "completed":
        how = f"the run is {run.status}, last logged step {step:,}"
    found = []
    if run.status != "completed":
        found.append(f"{how}; continue with: {run.record.get('command', '?')}")
    if not run.summary:
        found.append(f"no summary.json: {how}")
    if lacks_features(run):
        found.append(f"no features.json: `saerl report {run.path} --describe` writes it")
    if run.job == POLICY:
        found += [f"no metrics.jsonl: {how}"] if not run.metrics else []
        found += [f"no samples.jsonl: {how}"] if not run.samples else []
        if run.summary and not run.summary.get("behaviour"):
            found.append("no behaviour in summary.json: an earlier version of saerl wrote it; `saerl evaluate` adds it")
    return found


def lacks_features(run: RunFiles) -> bool:
    """Whether a finished run has coefficients whose features nobody has described."""
    coefficients = any(key in run.summary for key in COEFFICIENT_KEYS) and (run.path / "adapter").is_dir()
    return run.job == POLICY and coefficients and not run.features


# --- names -----------------------------------------------------------------------------------------------------------


def name_apart(runs: Sequence[RunFiles]) -> None:
    """Call policies by their adapter where that tells them apart, else by their folder, else by their path.

    What measured a policy is called by the policy.
    """
    policies = [run for run in runs if run.job == POLICY]
    alone = [run for run in runs if run.job in MEASURED and owner(run, policies) is None]
    named_runs = [*policies, *alone]
    for names in (
        [adapter_of(run) for run in named_runs],
        [run.path.name for run in named_runs],
        [str(run.path) for run in named_runs],
    ):
        if all(names) and len(set(names)) == len(names):
            break
    else:
        names = [str(run.path) for run in named_runs]
    for run, name in zip(named_runs, names, strict=True):
        run.name = name
    group(named_runs)
    for run in runs:
        if run in named_runs:
            continue
        mine = owner(run, policies) if run.job in MEASURED else None
        run.name, run.group = (mine.name, mine.group) if mine else (place(run.path), run.job.replace("_", "-"))


def place(path: Path) -> str:
    """A folder's name; with its parent's, where it is a number of a sweep."""
    return f"{path.parent.name}/{path.name}" if path.name.isdigit() else path.name


def adapter_of(run: RunFiles) -> str:
    """Kind of adapter, empty when unknown."""
    return str(run.summary.get("adapter") or run.settings.get("adapter.kind") or "")


def owner(run: RunFiles, policies: Sequence[RunFiles]) -> RunFiles | None:
    """The policy that a run measured; by its place, or by its name where the folders were moved."""
    if run.policy is None:
        return None
    place = Path(run.policy).resolve()
    exact = [policy for policy in policies if policy.path.resolve() == place]
    alike = [policy for policy in policies if policy.path.name == place.name]
    return (exact or (alike if len(alike) == 1 else []) or [None])[0]


def group(runs: Sequence[RunFiles]) -> None:
    """Name the method of every run: its adapter, and the settings in which runs of that adapter differ.

    Rewards of other parts differ in everything: those are told apart by the names of their parts alone.
    """
    own = [{k: short(v) for k, v in run.settings.items() if names_methods(k, v)} for run in runs]
    rewards = [reward_name(settings) for settings in own]
    if len({name for name in rewards if name}) > 1:
        own = [
            {k: v for k, v in settings.items() if not k.startswith("reward.")} | ({"reward": name} if name else {})
            for settings, name in zip(own, rewards, strict=True)
        ]
    for run, settings in zip(runs, own, strict=True):
        alike = [other for other, peer in zip(own, runs, strict=True) if other and adapter_of(peer) == adapter_of(run)]
        keys = differing(alike) if settings else []
        run.group = " ".join([adapter_of(run) or run.job, *named(settings, keys)])


def reward_name(settings: dict[str, Any]) -> str:
    """The names of a reward's parts; empty where there are none."""
    start = "reward.parts."
    return "+".join(dict.fromkeys(key.removeprefix(start).split(".")[0] for key in settings if key.startswith(start)))


def names_methods(key: str, value: Any) -> bool:
    """Whether a setting may tell methods apart: no seed, no number of processes, nothing that follows another."""
    follows = isinstance(value, str) and value.startswith("${")
    return not (key.startswith(IGNORED) or key.endswith(".seed") or follows)


def short(value: Any) -> Any:
    """A setting in a name: of a path the last part."""
    return Path(value).name if isinstance(value, str) and "/" in value else value
