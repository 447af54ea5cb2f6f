"""Gated: the encoder decides what fires, and a scaled and shifted copy of it how much."""

import torch
from torch import Tensor

from saerl_cli.config.sae import DecoderNorm, SaeConfig
from saerl_cli.sae.architectures import relu
from saerl_cli.sae.architectures.common import (
    Batch,
    Outcome,
    Parameters,
    along_norm,
    linear_gradients,
    pre_activations,
)
from saerl_cli.sae.layout import fitting

SAVED_AS = "jumprelu"
penalty_weight = relu.penalty_weight


def loss(p: Parameters, batch: Batch, config: SaeConfig, weight: float) -> Outcome:
    """The loss `gated` of `saerl_cli.sae.architectures`; b_enc is the gate's bias."""
    gate = pre_activations(p, batch, config.encoder_dtype)
    layout = fitting(gate > 0, config.kernel.value)
    pi = layout.take(gate).relu()
    stretch = layout.at(p["r_mag"].exp())
    product = layout.take(gate) - layout.at(p["b_enc"])  # x_c W^T
    open_ = pi > 0
    f = (product * stretch + layout.at(p["b_mag"])).relu() * open_
    error = layout.decode(f, p["decoder"]) + p["b_dec"] - batch.y
    by_gate = layout.decode(pi, p["decoder"]) + p["b_dec"] - batch.y
    g, g_gate = error * (2 / batch.tokens), by_gate * (2 / batch.tokens)
    norm = p["decoder"].norm(dim=-1)
    d_f = layout.dot(g, p["decoder"]) * (f > 0)
    d_pi = (layout.dot(g_gate, p["decoder"]) + layout.at(norm * (weight / batch.tokens))) * open_
    d_product = d_pi + d_f * stretch
    gradients, into = linear_gradients(batch, layout, f, d_product, g)
    gradients["b_enc"] = layout.sum(d_pi)
    gradients["b_mag"] = layout.sum(d_f)
    gradients["r_mag"] = layout.sum(d_f * stretch * product)
    pi_sum = layout.sum(pi)
    if config.decoder_norm is DecoderNorm.free:
        gradients["decoder"] = gradients["decoder"] + along_norm(p, pi_sum * (weight / batch.tokens))
    return Outcome(error, layout.count(f > 0), pi_sum @ norm, gradients, into)


def further_parameters(config: SaeConfig, n: int, device: torch.device) -> Parameters:
    """Return the logarithm of the scale and the bias of the magnitudes, 0."""
    return {name: torch.zeros(n, device=device) for name in ("r_mag", "b_mag")}


def fold(p: Parameters, cut: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the JumpReLU of M = x_c W e^r + b_mag (Rajamanoharan et al. 2024a, section 3.2).

    A feature fires where z > 0 and M > 0, hence where M > max(0, b_mag - e^r b_enc).
    """
    stretch = p["r_mag"].exp()
    threshold = (p["b_mag"] - stretch * p["b_enc"]).clamp_min(0) * p["decoder"].norm(dim=-1).clamp_min(1e-12)
    return p["encoder"] * stretch[:, None], p["b_mag"], threshold


def unfold(bias: Tensor, threshold: Tensor) -> Parameters:
    """Return a gate that opens where the pre-activation exceeds the threshold, which is the magnitude."""
    return {"b_mag": bias, "b_enc": bias - threshold}
