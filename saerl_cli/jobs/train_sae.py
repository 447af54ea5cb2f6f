"""`saerl train-sae`: SAEs from one stream of activations, evaluated on held-out text.

Killed at any moment and run again, it ends with the same weights to the bit: a checkpoint holds every tensor of the
trainers and the place of the stream. With several processes each takes its share of every batch and gradients are
summed, so that n processes with batch B train what one process with batch B would.
"""

import time
from typing import TYPE_CHECKING, Any

from saerl_cli.config.activations import check_stream
from saerl_cli.config.groups import DataKind, refuse_unless
from saerl_cli.config.train_sae import TrainSaeConfig
from saerl_cli.data.documents import row_length
from saerl_cli.models import Loaded, context_size, describe
from saerl_cli.run.files import read_json, write_json, write_safetensors
from saerl_cli.run.processes import process_group
from saerl_cli.run.progress import bar, say
from saerl_cli.sae.check import check_length, check_planned
from saerl_cli.sae.presets import conversion_line
from saerl_cli.sae.sweep import Planned, plan

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from saerl_cli.activations import ShuffledStream
    from saerl_cli.run.directory import Run
    from saerl_cli.sae.train import SaeTrainer


def check(config: TrainSaeConfig) -> None:
    """Refuse what cannot work, before anything is written and without loading weights."""
    check_stream(config.data, config.activations, config.sae.batch_size)
    description = describe(config.model)
    for planned in plan(config, description):
        check_planned(planned)
    row_length(config.data, context_size(description))
    refuse_unless(
        config.sae.batch_size >= config.launch.num_processes,
        f"sae.batch_size={config.sae.batch_size} is less than a token for each of launch.num_processes processes",
    )
    if config.data.kind is not DataKind.hub:
        check_length(config)


def work(config: TrainSaeConfig, run: "Run", accelerator: "Accelerator") -> float:
    """Train, save and evaluate the SAEs; returns their mean FVU."""
    import torch

    from saerl_cli.activations import open_stream
    from saerl_cli.models import load_model
    from saerl_cli.sae.loop import build_trainers, lower_precision
    from saerl_cli.sae.results import results

    loaded = load_model(config.model, accelerator.device, config.launch)
    plans = plan(config, loaded.model)
    sites = list({site.name: site for p in plans for site in (p.site, p.target) if site is not None}.values())
    announce(run, loaded, plans)
    group = process_group()
    trainers = build_trainers(plans, accelerator.device, group)
    place, seconds = resume(run, trainers)
    stream = open_stream(
        loaded,
        config.model,
        config.data,
        config.activations,
        sites,
        config.sae.batch_size,
        config.seed,
        group.rank,
        group.world_size,
        group.barrier,
        place,
    )
    try:
        with lower_precision(loaded.model, accelerator.autocast):
            seconds = train(config, run, plans, trainers, stream, seconds)
        account(run, stream, group.all_reduce(torch.tensor(stream.dropped, device=accelerator.device)))
    finally:
        stream.close()
    return results(config, run, accelerator.device, loaded, plans, trainers, seconds, group)


def announce(run: "Run", loaded: Loaded, plans: list[Planned]) -> None:
    """Record the model; say which sites are trivial and how settings were converted."""
    run.update(inputs={"model": {"name": loaded.name, "revision": loaded.revision, "sha256": loaded.sha256}})
    for site in {p.site.name: p.site for p in plans}.values():
        if site.trivial:
            say(
                f"warning: {site.name} sees the current token alone (parallel residual), so its SAE is trivially good"
                " and no evidence; use layers above 0"
            )
    lines = (conversion_line(p.config, (p.target or p.site).width) for p in plans)
    for line in dict.fromkeys(line for line in lines if line):
        say(line)


def account(run: "Run", stream: "ShuffledStream", dropped: "Tensor") -> None:
    """Say and record what has been left out since this start."""
    if int(dropped):
        say(f"left out {int(dropped)} activations as outliers since this start")
    note = stream.counts.note()
    if note:
        say(f"text: {note}")
    run.update(text={"outliers_since_start": int(dropped), "note": note or None})


def train(
    config: TrainSaeConfig,
    run: "Run",
    plans: list[Planned],
    trainers: "dict[str, SaeTrainer]",
    stream: "ShuffledStream",
    seconds: float,
) -> float:
    """Train to the end; returns the seconds it took, those before an interruption included."""
    from saerl_cli.sae.loop import training

    last = max(trainer.steps for trainer in trainers.values())
    start = max(trainer.step_number for trainer in trainers.values())
    where = {p.name: (p.site.name, p.target and p.target.name) for p in plans}
    began = time.monotonic() - seconds
    with bar(last, title(list(trainers)), start) as advance:
        for done, metrics in training(stream, trainers, config.log_every, where):
            note = ""
            if metrics:
                named = {f"{name}/{key}": value for name, m in metrics.items() for key, value in m.items()}
                run.log(done, tokens=done * config.sae.batch_size, **named)
                pace = config.sae.batch_size * done / max(time.monotonic() - began, 1e-9)
                note = f"FVU {sum(m['fvu'] for m in metrics.values()) / len(metrics):.3f}, {pace:,.0f} tokens/s"
            if run.writes and (done % config.checkpoint_every == 0 or done == last):
                save_checkpoint(run, trainers, stream.state(), done, time.monotonic() - began)
            advance(1, note)
    return time.monotonic() - began


def title(names: list[str]) -> str:
    """What the progress bar is called."""
    return f"SAE at {', '.join(names)}" if len(names) <= 4 else f"{len(names)} SAEs"


def save_checkpoint(
    run: "Run", trainers: "dict[str, SaeTrainer]", place: dict[str, Any], step: int, seconds: float
) -> None:
    """Keep every tensor of the trainers and the place of the stream."""
    with run.save_checkpoint(step) as folder:
        for name, trainer in trainers.items():
            write_safetensors(folder / f"{name}.safetensors", trainer.state(), {})
        write_json(folder / "state.json", {"step": step, "seconds": seconds, "stream": place})
    run.keep(1)


def resume(run: "Run", trainers: "dict[str, SaeTrainer]") -> tuple[dict[str, Any] | None, float]:
    """Continue from the newest checkpoint; returns the stream's place and the seconds spent until then."""
    from safetensors.torch import load_file

    found = run.latest_checkpoint()
    if found is None:
        run.truncate(0)
        return None, 0.0
    step, folder = found
    for name, trainer in trainers.items():
        trainer.load_state(load_file(folder / f"{name}.safetensors"))
    run.truncate(step)
    say(f"resuming at step {step}")
    state = read_json(folder / "state.json")
    return state["stream"], float(state["seconds"])
