"""A pipeline: an experiment as stages that follow from each other, in one YAML (`conf/pipeline/NAME.yaml`).

Words of a stage may hold references: `${seed}` is a value of the stage's `each` or a variable of the pipeline,
`${saes}` the run directory of the stage `saes` for the same values, a list of directories where it has several.
`${runs:method=full,seed=0}` chooses values oneself.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from saerl_cli.config.groups import refuse_unless

T = TypeVar("T")


@dataclass
class StageConfig:
    """One command of saerl, run once for every combination of the values of `each`."""

    command: str
    """Command word: train-lm, train-sae, rlhf, evaluate, ..."""
    words: list[str] = field(default_factory=list)
    """Words after the command."""
    each: Any = field(default_factory=dict)
    """Name -> values; a mapping of values adds the words that stand there to the runs of that value. The name of
    another stage takes over its values, without words."""
    needs: list[str] = field(default_factory=list)
    """Stages that must be finished first, besides those that the words refer to."""
    threads: int = 1
    """CPU threads of a run; results depend on them in the last bits."""
    gpus: int = 0
    """GPUs of a run; on this machine it sees no others, and with 0 none."""
    seconds: float | None = None
    """Expected time of a run, s, as measured for the card; when empty, a dry run shows what `saerl plan` says."""
    memory_gb: float | None = None
    """Expected peak memory of a run, GB; 1 is asked for when empty."""
    host_gb: Any = None
    """Memory of the machine that a run needs, GB, where it has a GPU, whose memory `memory_gb` is: a number, or one for
    every value of one of `each`, {size: {70m: 8, 410m: 16}}."""


@dataclass
class MetricConfig:
    """A number that is compared."""

    floor: float
    """Smallest tolerance, in units of the metric."""
    key: str | None = None
    """Its name in summary.json where that differs from the card's."""
    intervals: float | None = None
    """In the place of the pipeline's `intervals`: 0 for what is the same to the last digits on any machine."""


@dataclass
class ExpectConfig:
    """Rows of a stage's results that must agree with rows of the card's results.json."""

    stage: str
    """Stage whose summary.json is read; its values (`${seed}`) are part of every row."""
    label: str
    """What to call a row, for instance "${method} at ${kl} nats"; rows of one label are averaged."""
    match: dict[str, Any]
    """Keys of a recorded row -> the value that they must have there."""
    metrics: dict[str, Any]
    """Metric -> smallest tolerance, or a mapping of these settings."""
    rows: str | None = None
    """Part of summary.json that holds the rows, for instance `table`; the whole is one row when empty."""
    only: dict[str, str] = field(default_factory=dict)
    """Keys of a row -> glob that its value must match; other rows are left out."""
    record: str = "runs"
    """Part of results.json that holds the recorded rows, for instance `comparison.table`."""

    def wanted(self) -> dict[str, MetricConfig]:
        """`metrics`, typed."""
        return {
            name: built(MetricConfig, value, f"metric {name}") if isinstance(value, dict) else MetricConfig(value)
            for name, value in self.metrics.items()
        }


@dataclass
class SmallConfig:
    """What brings an experiment down to seconds: only these values, and further words."""

    each: dict[str, list[Any]] = field(default_factory=dict)
    """Name -> the values that are left."""
    words: dict[str, list[str]] = field(default_factory=dict)
    """Stage -> further words, after those that make its command small."""


@dataclass
class PipelineConfig:
    """An experiment."""

    name: str
    """Its name: that of its file."""
    stages: dict[str, StageConfig]
    """The stages, by name."""
    question: str = ""
    """What it asks, in a line."""
    card: str | None = None
    """Folder of `experiments/` that has its evidence; without one nothing is compared."""
    variables: dict[str, str] = field(default_factory=dict)
    """What must be given on the command line (`model=DIR`): name -> what it is."""
    expect: list[ExpectConfig] = field(default_factory=list)
    """What must agree with the card."""
    intervals: float = 2.0
    """A difference is tolerated up to so many half 95 % intervals of the recorded mean, or `floor`."""
    drift: float = 0.5
    """Largest mean difference of a metric over all its rows, in tolerances: many small differences to one side."""
    why: str = ""
    """Reason of the tolerances."""
    small: SmallConfig = field(default_factory=SmallConfig)
    """The size for tests."""


def load_pipeline(path: Path) -> PipelineConfig:
    """Read a pipeline.

    Raises:
        ValueError: one line naming the file and what is wrong in it.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        ok = isinstance(raw, dict) and isinstance(raw.get("stages"), dict) and bool(raw["stages"])
        refuse_unless(ok, "it must be a mapping with `stages`")
        pipeline = built(PipelineConfig, {"name": path.stem, **raw}, "pipeline")
        pipeline.stages = {name: built(StageConfig, stage, f"stage {name}") for name, stage in raw["stages"].items()}
        pipeline.expect = [built(ExpectConfig, part, f"expect {i + 1}") for i, part in enumerate(pipeline.expect)]
        pipeline.small = built(SmallConfig, raw.get("small", {}), "small")
        refuse_strangers(pipeline)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return pipeline


def built(kind: type[T], values: Any, place: str) -> T:
    """A dataclass from plain data; `ValueError` naming the place for keys that are missing or too many."""
    refuse_unless(isinstance(values, dict), f"{place} must be a mapping")
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    strange = [key for key in values if key not in known]
    refuse_unless(not strange, f"{place}: there is no key {strange and strange[0]}; there are {', '.join(known)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{place}: {str(error).partition(') ')[2]}") from None


def refuse_strangers(pipeline: PipelineConfig) -> None:
    """Refuse names of stages that do not exist."""
    known = ", ".join(pipeline.stages)
    for name, stage in pipeline.stages.items():
        named = [*stage.needs, *([stage.each] if isinstance(stage.each, str) else [])]
        strange = [other for other in named if other not in pipeline.stages]
        refuse_unless(not strange, f"stage {name}: there is no stage {strange and strange[0]}; there are {known}")
    used = [*(part.stage for part in pipeline.expect), *pipeline.small.words]
    strange = [name for name in used if name not in pipeline.stages]
    refuse_unless(not strange, f"there is no stage {strange and strange[0]}; there are {known}")
    values = {name for stage in pipeline.stages.values() if isinstance(stage.each, dict) for name in stage.each}
    strange = [name for name in pipeline.small.each if name not in values]
    refuse_unless(not strange, f"small.each: no stage has {strange and strange[0]}")
