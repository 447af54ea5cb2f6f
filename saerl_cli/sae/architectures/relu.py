"""ReLU with L1."""

import torch
from torch import Tensor

from saerl_cli.config.sae import DecoderNorm, SaeConfig
from saerl_cli.sae.architectures.common import (
    Batch,
    Outcome,
    Parameters,
    along_norm,
    linear_gradients,
    pre_activations,
)
from saerl_cli.sae.layout import fitting
from saerl_cli.sae.presets import canonical_l1

SAVED_AS = "standard"


def loss(p: Parameters, batch: Batch, config: SaeConfig, weight: float) -> Outcome:
    """The loss `relu` of `saerl_cli.sae.architectures`; where norms are held at 1 the penalty does not pull at them."""
    pre = pre_activations(p, batch, config.encoder_dtype)
    on = pre > 0  # [n, d_sae]
    layout = fitting(on, config.kernel.value)
    f = layout.take(pre).relu()
    error = layout.decode(f, p["decoder"]) + p["b_dec"] - batch.y
    g = error * (2 / batch.tokens)
    norm = p["decoder"].norm(dim=-1)
    d_f = layout.dot(g, p["decoder"]) + layout.at(norm * (weight / batch.tokens))
    gradients, into = linear_gradients(batch, layout, f, d_f * (f > 0), g)
    f_sum = layout.sum(f)
    if config.decoder_norm is DecoderNorm.free:
        gradients["decoder"] = gradients["decoder"] + along_norm(p, f_sum * (weight / batch.tokens))
    return Outcome(error, layout.count(f > 0), f_sum @ norm, gradients, into)


def penalty_weight(config: SaeConfig, d_out: int, variance: float) -> float:
    """Return `l1` in the canonical form."""
    return canonical_l1(config, d_out, variance)


def further_parameters(config: SaeConfig, n: int, device: torch.device) -> Parameters:
    """Return none."""
    return {}


def fold(p: Parameters, cut: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return encoder and bias as they are."""
    return p["encoder"], p["b_enc"], torch.zeros_like(p["b_enc"])


def unfold(bias: Tensor, threshold: Tensor) -> Parameters:
    """Return the bias as it is."""
    return {"b_enc": bias}
