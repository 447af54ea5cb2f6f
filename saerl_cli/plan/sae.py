"""`saerl train-sae` before it runs."""

from dataclasses import asdict
from math import ceil
from typing import Any

from saerl_cli.activations import row_length
from saerl_cli.activations.forward import FORWARD_TOKENS, rows_at_once
from saerl_cli.config.groups import DataKind, Precision
from saerl_cli.config.sae import L1_FAMILY, Architecture, EncoderDtype, Optimizer, SaeConfig
from saerl_cli.config.train_sae import TrainSaeConfig
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
    logits,
    piece,
    small,
    start,
)
from saerl_cli.sae.metrics import LOGITS_AT_ONCE
from saerl_cli.sae.sweep import Planned, plan

DENSE = 4.5
"""Matrices [batch, d_sae] that a step holds beside the pre-activations where many features fire."""
ROWS = 6
"""Matrices [batch, d_in] that a step holds."""
LIKELY_L0 = 64
"""Active features a token that are assumed where settings do not say."""


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
    stays: dict[str, float] = {
        "language model": shape.parameters * size,
        "SAEs": 4 * numbers,
        "their gradients": 4 * numbers,
        "their optimiser": 4 * kept,
        "shuffle buffer": (2 if config.activations.prefetch else 1) * capacity * width * size,
        "pre-activations": max(batch * p.config.width(p.site.width) * encoder_size(p.config) for p in plans),
        "text": text_bytes,
    }
    layers = 1 + max((shape.layers - 1 if site.layer is None else site.layer) for site in sites.values())
    rows = rows_at_once(length)
    fill: Work = [
        (capacity / (rows * length), forward(shape, layers, rows, length, dtype)),
        copied(4 * capacity * width * size),
        small(200),
    ]
    read = {"forward pass": rows * length * size * (HELD * shape.width + width)}
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


def active(config: SaeConfig, d_sae: int) -> float:
    """Active features a token."""
    if config.architecture in (Architecture.topk, Architecture.batchtopk, Architecture.matryoshka):
        return config.k
    return min(d_sae, config.target_l0 or LIKELY_L0)


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
    """The metrics on held-out text: reconstruction, and the loss with each site replaced."""
    length = row_length(config.data, shape.context)
    tokens = config.eval_tokens / config.launch.num_processes
    rows = max(1, min(FORWARD_TOKENS, LOGITS_AT_ONCE // shape.vocabulary) // length)
    whole = forward(shape, shape.layers, rows, length, dtype)
    targets = len({(p.target or p.site).name for p in plans})
    passes = tokens / (rows * length) * (1 + 2 * targets + len(plans))
    sizes = [(p.site.width, p.config.width(p.site.width)) for p in plans]
    products = sum(d_in * d_sae for d_in, d_sae in sizes)
    every, widest = sum(d_sae for _, d_sae in sizes), max(d_sae for _, d_sae in sizes)
    encoded = piece("encode", 12 * tokens * products, 40 * tokens * every, 200)
    work: Work = [
        (passes, whole),
        (passes, logits(shape, rows * length, dtype)),
        (tokens / (rows * length), whole),
        (1, encoded),
    ]
    heads = 6.0 * 4 * rows * length * shape.vocabulary
    if config.data.kind is not DataKind.planted:
        return Phase("evaluation", 1, work, {"logits": heads, "features": 3.0 * 4 * FORWARD_TOKENS * widest})
    # Attributes: activations of every SAE on all tokens at once, and two copies of one's; the logits are gone by then.
    labelled = 4.0 * config.eval_tokens * (every + 2 * widest)
    reviews = max(200, config.model.world.documents // 10) / 1000
    work += [(1, encoded), (reviews, piece("reviews", 0, 0, 15_000)), (0.5 * passes, whole)]
    holds = {"labelled features": labelled} if labelled > heads else {"logits": heads}
    return Phase("evaluation", 1, work, holds)
