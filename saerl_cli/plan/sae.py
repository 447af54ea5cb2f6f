"""`saerl train-sae` before it runs."""

from dataclasses import asdict
from math import ceil
from typing import Any

from saerl_cli.activations.forward import rows_at_once
from saerl_cli.config.groups import DataKind, Precision
from saerl_cli.config.sae import L1_FAMILY, Architecture, EncoderDtype, Optimizer, SaeConfig
from saerl_cli.config.train_sae import TrainSaeConfig
from saerl_cli.data.documents import row_length
from saerl_cli.plan import metrics
from saerl_cli.plan.dictionaries import active, dictionary_of
from saerl_cli.plan.launches import weights
from saerl_cli.plan.shapes import Shape, shape_of
from saerl_cli.plan.text import REVIEW_BYTES, reading
from saerl_cli.plan.work import (
    HELD,
    SIZE,
    Estimate,
    Phase,
    Piece,
    Work,
    copied,
    forward,
    piece,
    small,
    start,
)
from saerl_cli.sae.sweep import Planned, plan

DENSE = 4.5
"""Matrices [batch, d_sae] that a step holds beside the pre-activations where many features fire."""
ROWS = 6
"""Matrices [batch, d_in] that a step holds."""


def estimate(config: TrainSaeConfig) -> Estimate:
    """Sizes and work of training SAEs."""
    shape, description = shape_of(config.model)
    plans = plan(config, description)
    sites = {site.name: site for p in plans for site in (p.site, p.target) if site is not None}
    dtype, processes = computing(config), config.launch.num_processes
    size, length, whole = SIZE[config.model.dtype.value], row_length(config.data, shape.context), config.sae.batch_size
    batch = whole / processes
    capacity = max(1, config.activations.buffer(whole) // whole) * batch
    steps, width = max(p.config.steps() for p in plans), sum(site.width for site in sites.values())
    numbers = sum(map(sae_parameters, plans))
    kept = sum(sae_parameters(p) * states(p.config) for p in plans)
    text, text_bytes, notes = reading(config.data, config.model, REVIEW_BYTES)
    stays = weights(shape, size, config.launch) | {
        "SAEs": 4 * numbers,
        "their gradients": 4 * numbers,
        "their optimiser": 4 * kept,
        "shuffle buffer": (2 if config.activations.prefetch else 1) * capacity * width * size,
        "pre-activations": max(batch * p.config.width(p.site.width) * encoder_size(p.config) for p in plans),
        "text": text_bytes,
    }
    layers = 1 + max((shape.layers - 1 if site.layer is None else site.layer) for site in sites.values())
    fill, read = filling(shape, layers, length, capacity, width, dtype, size)
    step = [work for p in plans for work in step_work(p, batch, width, steps)]
    phases = [
        Phase("start and text", 1, [(1, start("sae")), (1, start("command")), *text]),
        Phase("activations", ceil(steps / (capacity / batch)), fill, read),
        Phase("SAE step", steps, step, step_bytes(plans, batch, width)),
        evaluation(config, shape, plans, dtype),
    ]
    disk = {"SAEs": 4.0 * numbers, "checkpoint": 4.0 * (numbers + kept)}
    counted = {"language model": shape.parameters, "SAEs": numbers, "trained": numbers}
    return Estimate("train-sae", processes, dtype, counted, stays, phases, disk, notes)


def filling(
    shape: Shape, layers: int, length: int, capacity: float, width: int, dtype: str, size: int
) -> tuple[Work, dict[str, float]]:
    """A shuffle buffer: work, and bytes beside it.

    Args:
        shape: the language model.
        layers: up to the highest site.
        length: tokens a row.
        capacity: tokens of the buffer.
        width: of all sites.
        dtype: what the model computes in.
        size: bytes of a number of an activation.
    """
    rows = rows_at_once(length)
    work: Work = [
        (capacity / (rows * length), forward(shape, layers, rows, length, dtype)),
        copied(4 * capacity * width * size),
        small(200),
    ]
    return work, {"forward pass": rows * length * size * (HELD * shape.width + width)}


def computing(config: TrainSaeConfig) -> str:
    """What the language model computes in."""
    return config.model.dtype.value if config.launch.mixed_precision is Precision.no else "bfloat16"


def sae_parameters(p: Planned) -> int:
    """Numbers that an SAE learns."""
    d_in, d_sae = p.site.width, p.config.width(p.site.width)
    d_out = p.target.width if p.target else d_in
    vectors = {Architecture.jumprelu: 2, Architecture.gated: 3}.get(p.config.architecture, 1)
    return d_sae * (d_out if p.config.tied else d_in + d_out) + vectors * d_sae + d_out


def states(config: SaeConfig) -> int:
    """Numbers that the optimiser keeps for each."""
    return 2 if config.optimizer is Optimizer.adam else 1


def encoder_size(config: SaeConfig) -> int:
    """Bytes of a pre-activation."""
    return 2 if config.encoder_dtype is EncoderDtype.bfloat16 else 4


def step_work(p: Planned, batch: float, width: int, steps: int) -> Work:
    """A step of one SAE, in proportion to the steps that it takes."""
    d_in, d_sae = p.site.width, p.config.width(p.site.width)
    fired = active(p.config, d_sae)
    flops = batch * (2 * d_in * d_sae + 2 * 4 * fired * d_in)
    moved = 4 * (12 * sae_parameters(p) + 3 * batch * d_sae + 10 * batch * d_in)
    share = p.config.steps() / steps
    return [(share, sae_step(p, batch, flops, moved)), copied(share * 8 * batch * width), small(share * 15)]


def sae_step(p: Planned, batch: float, flops: float, moved: float) -> Piece:
    """It as a piece; what has no say in its time is left out of its name."""
    settings: dict[str, Any] = {
        key: value
        for key, value in asdict(p.config).items()
        if key in ("architecture", "k", "auxk", "optimizer", "decoder_norm", "kernel", "tied", "encoder_dtype", "l1")
    }
    named = {key: getattr(value, "value", value) for key, value in settings.items()}
    sizes = {"d_in": p.site.width, "d_sae": p.config.width(p.site.width), "batch": max(1, round(batch))}
    return piece("sae_step", flops, moved, 120, **sizes, **named)


def step_bytes(plans: list[Planned], batch: float, width: int) -> dict[str, float]:
    """What a step holds beyond parameters, gradients and optimiser: that of the largest SAE."""

    def held(p: Planned) -> float:
        d_in, d_sae = p.site.width, p.config.width(p.site.width)
        dense = DENSE if p.config.architecture in L1_FAMILY or p.config.architecture is Architecture.jumprelu else 1.0
        return 4 * (sae_parameters(p) + d_sae * d_in + dense * batch * d_sae + ROWS * batch * d_in)

    return {"SAE step": max(map(held, plans)) + 4 * batch * width}


def evaluation(config: TrainSaeConfig, shape: Shape, plans: list[Planned], dtype: str) -> Phase:
    """The metrics on held-out text and, of the planted language, which features tell its attributes."""
    length = row_length(config.data, shape.context)
    tokens = config.eval_tokens / config.launch.num_processes
    saes = [dictionary_of(p) for p in plans]
    read = metrics.Reading(shape, saes, len({(p.target or p.site).name for p in plans}), tokens, length, dtype)
    work, holds = metrics.metrics(read), metrics.held(read)
    if config.data.kind is not DataKind.planted:
        return Phase("evaluation", 1, work, holds)
    # Attributes: activations of every SAE on all tokens at once, and two copies of one's; the logits are gone by then.
    every, widest = sum(sae.d_sae for sae in saes), max(sae.d_sae for sae in saes)
    labelled = 4.0 * config.eval_tokens * (every + 2 * widest)
    reviews = max(200, config.model.planted.documents // 10) / 1000
    chunk = read.chunk * length
    work += [(tokens / chunk, forward(shape, read.layers, read.chunk, length, dtype))]
    work += [(tokens / chunk, sae.measured(chunk, "encode")) for sae in saes]
    work += [(reviews, piece("reviews", 0, 0, 15_000))]
    return Phase("evaluation", 1, work, {"labelled features": labelled} if labelled > sum(holds.values()) else holds)
