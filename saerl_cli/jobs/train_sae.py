"""The job of `saerl train-sae`: SAEs from one stream of activations, evaluated on held-out text.

Killed at any moment and run again, it ends with the same weights to the bit: a checkpoint holds every tensor of the
trainers and the place of the stream. With several processes each takes its share of every batch and gradients are
summed, so that n processes with batch B train what one process with batch B would.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from saerl_cli.activations import check_stream, iter_documents, planted_reviews, row_length
from saerl_cli.config.groups import DataKind, ModelKind, refuse_unless
from saerl_cli.config.sae import Centre
from saerl_cli.config.train_sae import TrainSaeConfig
from saerl_cli.models import Loaded, context_size, describe, light_tokenizer, locate
from saerl_cli.run.files import read_json, write_json, write_safetensors
from saerl_cli.run.processes import Team
from saerl_cli.run.progress import bar, say
from saerl_cli.sae.files import check_source
from saerl_cli.sae.presets import conversion_line
from saerl_cli.sae.sweep import Planned, plan

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from saerl_cli.activations import ShuffledStream
    from saerl_cli.run.directory import Run
    from saerl_cli.sae.train import SaeTrainer

Reduce = Callable[["Tensor"], "Tensor"]


# --- before a run ----------------------------------------------------------------------------------------------------


def check(config: TrainSaeConfig) -> None:
    """Refuse what cannot work, before anything is written and without loading weights."""
    check_stream(config.data, config.activations, config.sae.batch_size)
    description = describe(config.model)
    for planned in plan(config, description):
        _check_planned(planned)
    row_length(config.data, context_size(description))
    refuse_unless(
        config.sae.batch_size >= config.launch.num_processes,
        f"sae.batch_size={config.sae.batch_size} is less than a token for each of launch.num_processes processes",
    )
    if config.data.kind is not DataKind.hub:
        _check_length(config)


def _check_planned(planned: Planned) -> None:
    sae, site = planned.config, planned.site
    sae.width(site.width)
    if planned.target is not None:
        refuse_unless(not sae.tied, f"sae.tied belongs to autoencoders; {planned.name} is a transcoder")
    if sae.init_from is None:
        return
    refuse_unless(sae.centre is not Centre.off, "sae.init_from brings a b_dec, which sae.centre=off would ignore")
    info = check_source(sae.init_from, site.width, sae.width(site.width), site=site.name)
    wanted = None if planned.target is None else planned.target.width
    if info is not None and info.d_out != wanted:
        kind, other = ("an SAE", "a transcoder") if wanted is None else ("a transcoder", "an SAE")
        raise ValueError(f"sae.init_from={sae.init_from} does not fit: {planned.name} is to be {kind}, that is {other}")


def _check_length(config: TrainSaeConfig) -> None:
    """Refuse training text shorter than one batch, without tokenizing more of it than a batch."""
    if config.data.kind is DataKind.planted:
        lengths = (len(review.words) for review in planted_reviews(config.data, config.model, "train"))
    else:
        texts = iter_documents(config.data, config.model, "train")
        tokenizer = light_tokenizer(locate(config.model)) if config.model.kind is ModelKind.local else None
        if tokenizer is None:  # nothing to count with yet
            return
        lengths = (len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
    tokens, needed = 0, config.sae.batch_size
    for length in lengths:
        tokens += length
        if tokens >= needed:
            return
    raise ValueError(
        f"the training text holds {tokens} tokens, less than one batch of sae.batch_size={needed};"
        " lower it or give more text"
    )


# --- the work --------------------------------------------------------------------------------------------------------


def work(config: TrainSaeConfig, run: "Run", accelerator: "Accelerator") -> float:
    """Train, save and evaluate the SAEs; returns their mean FVU."""
    from saerl_cli.activations import open_stream
    from saerl_cli.models import load_model
    from saerl_cli.sae.results import results

    loaded = load_model(config.model, accelerator.device, config.launch)
    plans = plan(config, loaded.model)
    sites = list({site.name: site for p in plans for site in (p.site, p.target) if site is not None}.values())
    _announce(run, loaded, plans)
    reduce = _team(accelerator).total
    trainers = _trainers(plans, accelerator, reduce)
    place, seconds = _resume(run, trainers)
    stream = open_stream(
        loaded,
        config.model,
        config.data,
        config.activations,
        sites,
        config.sae.batch_size,
        config.seed,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.wait_for_everyone,
        place,
    )
    try:
        with _autocast(loaded.model, accelerator):
            seconds = _train(config, run, plans, trainers, stream, seconds, reduce)
        _account(run, stream, reduce, accelerator)
    finally:
        stream.close()
    return results(config, run, accelerator.device, loaded, plans, trainers, seconds, _team(accelerator))


def _announce(run: "Run", loaded: Loaded, plans: list[Planned]) -> None:
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


def _trainers(plans: list[Planned], accelerator: "Accelerator", reduce: Reduce) -> "dict[str, SaeTrainer]":
    from saerl_cli.sae.architectures.common import Processes
    from saerl_cli.sae.files import open_sae
    from saerl_cli.sae.layout import Scratch
    from saerl_cli.sae.train import SaeTrainer

    processes = Processes(accelerator.process_index, accelerator.num_processes, reduce)
    scratch = Scratch()
    return {
        p.name: SaeTrainer(
            p.site.width,
            p.config,
            accelerator.device,
            processes,
            p.site.name,
            None if p.target is None else p.target.width,
            None if p.config.init_from is None else open_sae(p.config.init_from, p.site.name),
            scratch,
        )
        for p in plans
    }


@contextmanager
def _autocast(model: Any, accelerator: "Accelerator") -> Iterator[None]:
    """The language model's forward passes in launch.mixed_precision; SAEs have their own `encoder_dtype`."""
    forward = model.forward

    def in_lower_precision(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return forward(*args, **kwargs)

    model.forward = in_lower_precision
    try:
        yield
    finally:
        model.forward = forward


def _team(accelerator: "Accelerator") -> Team:
    return Team(accelerator.process_index, accelerator.num_processes)


def _account(run: "Run", stream: "ShuffledStream", reduce: Reduce, accelerator: "Accelerator") -> None:
    """Say and record what has been left out since this start."""
    import torch

    dropped = int(reduce(torch.tensor(stream.dropped, device=accelerator.device)))
    if dropped:
        say(f"left out {dropped} activations as outliers since this start")
    note = stream.counts.note()
    if note:
        say(f"text: {note}")
    run.update(text={"outliers_since_start": dropped, "note": note or None})


# --- training --------------------------------------------------------------------------------------------------------


def _train(
    config: TrainSaeConfig,
    run: "Run",
    plans: list[Planned],
    trainers: "dict[str, SaeTrainer]",
    stream: "ShuffledStream",
    seconds: float,
    reduce: Reduce,
) -> float:
    """Train to the end; returns the seconds it took, those before an interruption included."""
    from saerl_cli.sae.loop import training

    last = max(trainer.steps for trainer in trainers.values())
    start = max(trainer.step_number for trainer in trainers.values())
    where = {p.name: (p.site.name, p.target and p.target.name) for p in plans}
    began = time.monotonic() - seconds
    with bar(last, _title(list(trainers)), start) as advance:
        for done, metrics in training(stream, trainers, config.log_every, where):
            note = ""
            if metrics:
                named = {f"{name}/{key}": value for name, m in metrics.items() for key, value in m.items()}
                run.log(done, tokens=done * config.sae.batch_size, **named)
                pace = config.sae.batch_size * done / max(time.monotonic() - began, 1e-9)
                note = f"FVU {sum(m['fvu'] for m in metrics.values()) / len(metrics):.3f}, {pace:,.0f} tokens/s"
            if run.writes and (done % config.checkpoint_every == 0 or done == last):
                _save_checkpoint(run, trainers, stream.state(), done, time.monotonic() - began)
            advance(1, note)
    return time.monotonic() - began


def _title(names: list[str]) -> str:
    return f"SAE at {', '.join(names)}" if len(names) <= 4 else f"{len(names)} SAEs"


def _save_checkpoint(
    run: "Run", trainers: "dict[str, SaeTrainer]", place: dict[str, Any], step: int, seconds: float
) -> None:
    with run.save_checkpoint(step) as folder:
        for name, trainer in trainers.items():
            write_safetensors(folder / f"{name}.safetensors", trainer.state(), {})
        write_json(folder / "state.json", {"step": step, "seconds": seconds, "stream": place})
    run.keep(1)


def _resume(run: "Run", trainers: "dict[str, SaeTrainer]") -> tuple[dict[str, Any] | None, float]:
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
