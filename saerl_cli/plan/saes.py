"""`saerl train-sae` and `saerl eval-sae` before they run, and SAEs that may not be trained yet."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from saerl_cli.config.adapter import AdapterConfig
from saerl_cli.config.eval_sae import EvalSaeConfig
from saerl_cli.config.sae import Architecture, Optimizer
from saerl_cli.config.train_sae import TrainSaeConfig
from saerl_cli.data.documents import row_length
from saerl_cli.models import Site, context_size, resolve_sites
from saerl_cli.plan.meta import Estimate, Sequence, count, language_model, sequence, size, weights
from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.evaluate import list_saes, settings
from saerl_cli.sae.files import find_saes, read_sae_config
from saerl_cli.sae.files.saelens import site_of
from saerl_cli.sae.sweep import plan
from saerl_cli.sae.train import SaeTrainer

L0 = 64
"""Active features a token that are assumed."""
CHUNK = 8192
"""Tokens that are measured at once."""
FINISHED = {Architecture.topk: "topk", Architecture.relu: "standard"}
"""What training makes of an architecture; of the others, a JumpReLU SAE."""

Placed = tuple[Site, SAE]
"""An SAE on the meta device, and where it reads."""


def placed(site: Site, d_in: int, d_sae: int, architecture: str, k: int | None) -> Placed:
    """An SAE of these sizes."""
    with torch.device("meta"):
        return site, SAE(d_in, d_sae, architecture, k or L0 if architecture == "topk" else None)


def read(folder: Path, description: Any) -> Placed:
    """An SAE by its settings file alone."""
    config = read_sae_config(folder)
    (site,) = resolve_sites([site_of(config) or folder.name], description)
    return placed(site, config["d_in"], config["d_sae"], config.get("architecture", "standard"), config.get("k"))


def made(config: TrainSaeConfig, description: Any) -> list[Placed]:
    """The SAEs that a run of `saerl train-sae` makes of a model."""
    return [
        placed(p.site, p.site.width, p.config.width(p.site.width), FINISHED.get(p.config.architecture, "jumprelu"), L0)
        for p in plan(config, description)
    ]


def of_adapter(adapter: AdapterConfig, description: Any, making: TrainSaeConfig | None) -> list[Placed]:
    """The SAEs that coefficients are put on, one a site.

    Args:
        adapter: which.
        description: the language model's config.
        making: the run that makes the folder `adapter.saes`, where it is not there yet.

    Raises:
        ValueError: sites that the model lacks, or none of those that the adapter names.
    """
    if adapter.saes is None:  # random directions
        sites = resolve_sites(adapter.sites or [], description)
        return [placed(site, site.width, adapter.d_sae or 0, "topk", adapter.k) for site in sites]
    if making is not None:
        found = made(making, description)
    else:
        found = [read(folder, description) for folder in find_saes(adapter.saes).values()]
    kept = {site.name: (site, sae) for site, sae in found if not adapter.sites or site.name in adapter.sites}
    if not kept:
        raise ValueError(f"{adapter.saes} has no SAE at any of adapter.sites; give the words that train it in --sae")
    return list(kept.values())


def encoded(saes: Iterable[Placed], tokens: float) -> ndarray:
    """Work of the features of some tokens."""
    return np.array([sum(2 * tokens * sae.W_enc.numel() for _, sae in saes), 0.0])


def below(sites: Iterable[Site], layers: int) -> float:
    """Share of the layers up to the highest site."""
    return (1 + max(layers - 1 if site.layer is None else site.layer for site in sites)) / layers


def train_sae(config: TrainSaeConfig) -> Estimate:
    """SAEs trained in one pass over activations; a step is an encoder's dense product and four sparse ones."""
    model, launch = language_model(config.model), config.launch
    stays, whole = weights(model, launch), count(model.parameters())
    plans, number = plan(config, model.config), next(model.parameters()).element_size()
    trainers = [SaeTrainer(p.site.width, p.config, "meta", d_out=p.target and p.target.width) for p in plans]
    sizes = [count(trainer.p.values()) for trainer in trainers]
    kept = sum(n * (2 if p.config.optimizer is Optimizer.adam else 1) for n, p in zip(sizes, plans, strict=True))
    one = sequence(model, row_length(config.data, context_size(model.config)), config.model, launch)
    sites = {site for p in plans for site in (p.site, p.target) if site is not None}
    part, width = below(sites, one.layers), sum(site.width for site in sites)
    batch, steps = config.sae.batch_size / launch.num_processes, max(trainer.steps for trainer in trainers)
    step = one.passes(batch / one.tokens, part=part, split=batch / CHUNK)
    for trainer in trainers:
        step[0] += batch * trainer.d_in * (2 * trainer.d_sae + 8 * L0) * trainer.steps / steps
    buffer = config.activations.buffer(config.sae.batch_size) / launch.num_processes
    work, holds = measured(one, made(config, model.config), config.eval_tokens / launch.num_processes, part)
    each = 4.0 * sum(sizes)
    return Estimate(
        {"language model": whole, "SAEs": sum(sizes), "trained": sum(sizes)},
        stays
        | {"SAEs": each, "their gradients": each, "their optimiser": 4.0 * kept}
        | {"shuffle buffer": buffer * width * number * (2 if config.activations.prefetch else 1)},
        one,
        work,
        holds,
        "steps",
        steps,
        step,
        20 * max(batch * trainer.d_sae for trainer in trainers) + 4 * max(sizes),
        {"SAEs": each, "checkpoint": each + 4.0 * kept},
    )


def measured(one: Sequence, saes: list[Placed], tokens: float, part: float) -> tuple[ndarray, float]:
    """The metrics of SAEs, and bytes: reconstruction, and losses with a site whole, 0, its mean, and by each SAE."""
    times = 1 + 2 * len({site.name for site, _ in saes}) + len(saes)
    work = one.passes(tokens / one.tokens, part=part, split=tokens / CHUNK) + encoded(saes, 4 * tokens)
    work += one.passes(tokens / one.tokens * times, one.tokens, split=tokens / CHUNK * times)
    return work, max(12.0 * CHUNK * max(sae.d_sae for _, sae in saes), 6 * min(CHUNK * one.logits, 2.0**29))


def eval_sae(config: EvalSaeConfig, making: TrainSaeConfig | None) -> Estimate:
    """SAEs measured on held-out text, with their controls, two of which are trained and all measured alike.

    Raises:
        ValueError: a folder without SAEs.
    """
    if making is not None:
        data, model_config = making.data, making.model
        model = language_model(model_config)
        saes = made(making, model.config)
    else:
        folders = list_saes(config.paths())
        model_config, data = settings(config, folders)
        model = language_model(model_config)
        saes = [read(folder, model.config) for folder in folders.values()]
    numbers, stays = sum(count(sae.parameters()) for _, sae in saes), weights(model, config.launch)
    stays["SAEs"] = sum(size(sae.parameters()) for _, sae in saes)
    one = sequence(model, row_length(data, context_size(model.config)), model_config, config.launch)
    part = below((site for site, _ in saes), one.layers)
    work, holds = measured(one, saes, config.eval_tokens / config.launch.num_processes, part)
    work = work * (5 if config.controls else 1)
    work += encoded(saes, 2 * config.probe_tokens + 6 * config.control_tokens * config.controls)
    return Estimate({"language model": count(model.parameters()), "SAEs": numbers}, stays, one, work, holds)
