"""`saerl eval-sae` before it runs."""

from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from saerl_cli.config.eval_sae import EvalSaeConfig
from saerl_cli.config.groups import DataConfig, ModelConfig
from saerl_cli.config.sae import SaeConfig
from saerl_cli.data.documents import row_length
from saerl_cli.models import Site, resolve_sites
from saerl_cli.plan import metrics, probing
from saerl_cli.plan.compose import composed
from saerl_cli.plan.dictionaries import Dictionary, dictionary_of, found
from saerl_cli.plan.launches import weights
from saerl_cli.plan.metrics import Reading
from saerl_cli.plan.sae import filling, sae_parameters, states, step_bytes, step_work
from saerl_cli.plan.shapes import Shape, shape_of
from saerl_cli.plan.text import REVIEW_BYTES, reading
from saerl_cli.plan.work import SIZE, Estimate, Phase, Work, piece, start
from saerl_cli.sae.evaluate import combined, control_settings, list_saes, settings
from saerl_cli.sae.files import provenance, read_sae_config
from saerl_cli.sae.files.saelens import site_of
from saerl_cli.sae.stability import MATCHED_UP_TO
from saerl_cli.sae.sweep import Planned, plan

BUFFER_TOKENS = 65_536
"""Of the stream that controls are trained on, at least (`saerl_cli.sae.controls`)."""
TIMED_WIDTH = 1024
"""Directions whose pairing is timed; that of more takes longer by the third power, at most."""


@dataclass(frozen=True)
class Measured:
    """An SAE that is measured."""

    sae: Dictionary
    planned: Planned
    """Where it reads and writes, and how a control of it is trained."""
    trains: bool
    """Whether it has trained controls."""

    @property
    def target(self) -> Site:
        """The site that it writes."""
        return self.planned.target or self.planned.site

    @property
    def kind(self) -> tuple[str, str, int]:
        """What it must share with another for their directions to be compared."""
        return self.planned.site.name, self.target.name, self.sae.d_sae


@dataclass(frozen=True)
class Task:
    """What is measured, on which text."""

    config: EvalSaeConfig
    model: ModelConfig
    data: DataConfig
    shape: Shape
    saes: list[Measured]
    notes: list[str]


def estimate(config: EvalSaeConfig, sae_words: list[str]) -> Estimate:
    """Sizes and work of measuring SAEs.

    Args:
        config: its settings.
        sae_words: of the `saerl train-sae` that makes the SAEs, where they are not there yet.

    Raises:
        ValueError: folders without SAEs, SAEs of another model, or settings that make no sense.
    """
    task = task_of(config, sae_words)
    shape, size = task.shape, SIZE[task.model.dtype.value]
    numbers = sum(one.sae.parameters for one in task.saes)
    share = 1.0 if config.controls else task.data.heldout  # of the documents that become tokens
    text, text_bytes, notes = reading(task.data, task.model, REVIEW_BYTES, share)
    read = reading_of(task)
    phases = [
        Phase("start and text", 1, [(1, start("eval")), (1, start("command")), *text]),
        Phase("metrics", 1, metrics.metrics(read), metrics.held(read)),
        *(controls(task, read) if config.controls else []),
        *stability(task),
        *probing.phases(config, task.data, task.model, read),
        Phase("table and figures", 1, [(1, piece("figures", 0, 0, 400_000))]),
    ]
    return Estimate(
        command="eval-sae",
        processes=config.launch.num_processes,
        dtype=read.dtype,
        parameters={"language model": shape.parameters, "SAEs": numbers},
        stays=weights(shape, size, config.launch) | {"SAEs": 4.0 * numbers, "text": text_bytes},
        phases=phases,
        disk={},
        notes=[*task.notes, *notes],
    )


def reading_of(task: Task) -> Reading:
    """The pass over held-out text."""
    tokens = task.config.eval_tokens / task.config.launch.num_processes
    length = row_length(task.data, task.shape.context)
    targets = len({one.target.name for one in task.saes})
    return Reading(task.shape, [one.sae for one in task.saes], targets, tokens, length, task.model.dtype.value)


# --- which SAEs -----------------------------------------------------------------------------------------------------


def task_of(config: EvalSaeConfig, sae_words: list[str]) -> Task:
    """The SAEs of the folders; where one is not there yet, those that `saerl train-sae WORDS` makes, a sweep's all."""
    if all(Path(path).is_dir() for path in config.paths()):
        folders = list_saes(config.paths())
        model, data = settings(config, folders)
        shape, description = shape_of(model)
        saes = [measured(folder, description, config.control_tokens) for folder in folders.values()]
        return Task(config, model, data, shape, saes, [])
    train = composed("train_sae", sae_words)
    recorded: dict[str, Any] = {"model": plain(train.model), "data": plain(train.data)}
    model = combined("model", config.model, recorded, ModelConfig)
    data = combined("data", config.data, recorded, DataConfig)
    shape, description = shape_of(model)
    saes = [Measured(dictionary_of(p), control_of(p, config.control_tokens), True) for p in plan(train, description)]
    what = f"saerl train-sae {' '.join(sae_words)}".strip()
    note = f"{', '.join(config.paths())} is not there yet: taken to hold what `{what}` makes"
    return Task(config, model, data, shape, saes, [note])


def plain(config: Any) -> dict[str, Any]:
    """Settings as a config file holds them."""
    from omegaconf import OmegaConf

    return dict(OmegaConf.to_container(OmegaConf.structured(config)))  # type: ignore[call-overload]


def measured(folder: Path, description: Any, control_tokens: int) -> Measured:
    """An SAE that is there."""
    config = read_sae_config(folder)
    name = site_of(config) or folder.name
    site, target = (resolve_sites([at], description)[0] for at in (name, provenance(config).get("target") or name))
    training = control_settings(config, control_tokens)
    planned = Planned(folder.name, site, target if target != site else None, training or SaeConfig())
    return Measured(found(name, folder, description), planned, training is not None)


def control_of(planned: Planned, tokens: int) -> Planned:
    """The same SAE with the tokens of a control.

    Raises:
        ValueError: fewer than a batch.
    """
    return replace(planned, config=replace(planned.config, tokens=tokens, init_from=None))


# --- controls and comparisons ---------------------------------------------------------------------------------------


def controls(task: Task, read: Reading) -> list[Phase]:
    """SAEs trained on the model and on it with shuffled weights, and the metrics of all that should mean nothing."""
    plans = [one.planned for one in task.saes if one.trains]
    shape, numbers = task.shape, sum(sae.parameters for sae in read.saes)
    size = SIZE[read.dtype]
    kinds = 2 * bool(plans) + 2  # of controls that are measured
    made = {"shuffled model": shape.parameters * size, "controls": 4.0 * numbers * kinds}
    phases = []
    if plans:
        batch = max(p.config.batch_size for p in plans)
        steps = max(p.config.steps() for p in plans)
        width = sum(site.width for site in {s.name: s for p in plans for s in (p.site, p.target) if s}.values())
        capacity = max(1, max(BUFFER_TOKENS, batch) // batch) * batch
        fills = max(1.0, steps * batch / capacity)
        fill, passing = filling(shape, read.layers, read.length, capacity, width, read.dtype, size)
        step = [part for p in plans for part in step_work(p, p.config.batch_size, width, steps)]
        work = [*((fills * n, part) for n, part in fill), *((steps * n, part) for n, part in step)]
        kept = sum(sae_parameters(p) * (2 + states(p.config)) for p in plans)
        holds = {
            "shuffled model": shape.parameters * size,
            "controls": 4.0 * numbers,
            "SAEs in training": 4.0 * kept,
            "shuffle buffer": capacity * width * size,
        }
        holds |= max(passing, step_bytes(plans, batch, width), key=lambda part: sum(part.values()))
        phases.append(Phase("training controls", 2, work, holds))
    work = [(kinds * n, part) for n, part in metrics.metrics(read)]
    return [*phases, Phase("metrics of controls", 1, work, made | metrics.held(read))]


def stability(task: Task) -> list[Phase]:
    """Every two SAEs of a site and width, and random ones: cosines of all directions, and their pairing."""
    work: Work = []
    groups: dict[tuple[str, str, int], list[Measured]] = {}
    for one in task.saes:
        groups.setdefault(one.kind, []).append(one)
    for (_, _, d_sae), members in groups.items():
        pairs = len(list(combinations(members, 2)))
        if not pairs:
            continue
        work.append(((pairs + 1) * 3, metrics.cosines(d_sae, members[0].target.width)))
        if d_sae <= MATCHED_UP_TO:
            few = min(d_sae, TIMED_WIDTH)
            work.append(((pairs + 1) * (d_sae / few) ** 3, piece("matching", 0, 0, 50 * few, width=few)))
    widest = max((d_sae for (_, _, d_sae), members in groups.items() if len(members) > 1), default=0)
    return [Phase("stability", 1, work, {"cosines": 4.0 * widest**2 * 3})] if work else []
