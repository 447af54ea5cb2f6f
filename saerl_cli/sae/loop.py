"""Many SAEs in one pass: every batch of activations is used by all of them, whatever their sites and settings."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any, overload

from torch import Tensor

from saerl_cli.config.sae import SaeConfig
from saerl_cli.run.processes import ProcessGroup
from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.files import open_sae
from saerl_cli.sae.layout import Scratch
from saerl_cli.sae.sweep import Planned
from saerl_cli.sae.train import SaeTrainer

Batch = Tensor | Mapping[str, Tensor]
Places = Mapping[str, tuple[str, str | None]]
"""Name of a trainer -> the site it reads, and the site it predicts (None for an autoencoder)."""


def training(
    batches: Iterable[Batch],
    trainers: Mapping[str, SaeTrainer],
    log_every: int = 100,
    places: Places | None = None,
) -> Iterator[tuple[int, dict[str, dict[str, float]] | None]]:
    """Train on every batch until the longest trainer is done; yields (steps done, metrics or None) after each step.

    Args:
        batches: tensors [n, d_in] for all trainers, or a dict of them by site.
        trainers: by name; those that are done already are left alone.
        log_every: metrics are measured on the first, every `log_every`-th and the last step.
        places: where each trainer reads; its own name when None.

    Raises:
        ValueError: the batches end too early.
    """
    places = places or {name: (name, None) for name in trainers}
    last = max(trainer.steps for trainer in trainers.values())
    first = max(trainer.step_number for trainer in trainers.values())  # those that are done stand further back
    done = first
    for batch in islice(batches, last - first):
        measure = done == 0 or (done + 1) % log_every == 0 or done + 1 == last
        metrics = {}
        for name, trainer in trainers.items():
            if trainer.step_number < trainer.steps:
                site, target = places[name]
                x = batch if isinstance(batch, Tensor) else batch[site]
                y = batch[target] if target is not None and not isinstance(batch, Tensor) else None
                numbers = trainer.step(x, y, getattr(batches, "positions", None), measure)
                if numbers is not None:
                    metrics[name] = numbers
        done += 1
        yield done, metrics if measure else None
    if done < last:
        raise ValueError(f"the activations ended after {done} of {last} batches; lower sae.tokens or give more text")


@overload
def train_saes(batches: Iterable[Batch], configs: Sequence[SaeConfig]) -> list[SAE]: ...
@overload
def train_saes(batches: Iterable[Batch], configs: Mapping[str, SaeConfig]) -> dict[str, SAE]: ...
def train_saes(
    batches: Iterable[Batch], configs: Sequence[SaeConfig] | Mapping[str, SaeConfig]
) -> list[SAE] | dict[str, SAE]:
    """Train several SAEs in one pass over activations.

    Args:
        batches: any iterable of activations [n, d_in] (all SAEs see the same) or of dicts site -> [n, d_in].
        configs: a list of settings, or settings by site.

    Returns:
        SAEs for raw activations: a list, or a dict by site, as `configs`.
    """
    named = dict(configs) if isinstance(configs, Mapping) else {str(i): c for i, c in enumerate(configs)}
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise ValueError("there are no activations to train on")

    def rest() -> Iterator[Batch]:
        yield first
        yield from iterator

    inputs = {name: first if isinstance(first, Tensor) else first[name] for name in named}
    scratch = Scratch()
    trainers = {
        name: SaeTrainer(inputs[name].shape[-1], config, inputs[name].device, name=name, scratch=scratch)
        for name, config in named.items()
    }
    for _ in training(rest(), trainers, log_every=10**9):
        pass
    finished = {name: trainer.finish() for name, trainer in trainers.items()}
    return finished if isinstance(configs, Mapping) else list(finished.values())


# --- of a run --------------------------------------------------------------------------------------------------------


def build_trainers(plans: Sequence[Planned], device: Any, group: ProcessGroup) -> dict[str, SaeTrainer]:
    """A trainer for every SAE of a run, by name."""
    scratch = Scratch()
    return {
        p.name: SaeTrainer(
            p.site.width,
            p.config,
            device,
            group,
            p.site.name,
            None if p.target is None else p.target.width,
            None if p.config.init_from is None else open_sae(p.config.init_from, p.site.name),
            scratch,
        )
        for p in plans
    }


@contextmanager
def lower_precision(model: Any, autocast: Callable[..., AbstractContextManager[Any]]) -> Iterator[None]:
    """Run the language model's forward passes under `autocast`; SAEs have their own `encoder_dtype`."""
    forward = model.forward

    def in_lower_precision(*args: Any, **kwargs: Any) -> Any:
        with autocast():
            return forward(*args, **kwargs)

    model.forward = in_lower_precision
    try:
        yield
    finally:
        model.forward = forward
