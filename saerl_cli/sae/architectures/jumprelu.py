"""JumpReLU: a learned threshold a feature, and what firing costs.

A step function has no gradient; the rectangle K(u) = 1[|u| < 1/2] of width eps around the threshold gives one
(Rajamanoharan et al. 2024b):

    d f / d theta = -theta/eps K((z - theta)/eps)        d 1[z > theta] / d theta = -1/eps K((z - theta)/eps)

With `ste_to_input`, z gets the same with the opposite sign (Anthropic, January 2025). Penalties, L0_t being the number
of active features of token t and L0* the target:

    step       sum_t L0_t                       target      (mean L0_t / L0* - 1)^2, times the number of tokens
    tanh       sum_t sum_i tanh(c f_i |D_i|)    quadratic   sum_t (L0_t / L0* - 1)^2
"""

import torch
from torch import Tensor

from saerl_cli.config.sae import DecoderNorm, Penalty, SaeConfig
from saerl_cli.sae.architectures.common import (
    Batch,
    Outcome,
    Parameters,
    add,
    along_norm,
    linear_gradients,
    pre_activations,
)
from saerl_cli.sae.layout import Layout, fitting, full_precision

SAVED_AS = "jumprelu"


def loss(p: Parameters, batch: Batch, config: SaeConfig, weight: float) -> Outcome:
    """The loss `jumprelu` of `saerl_cli.sae.architectures`."""
    theta, width = p["threshold"], config.bandwidth
    pre = pre_activations(p, batch, config.encoder_dtype)
    layout = fitting(pre > theta - width / 2, config.kernel.value)  # whatever fires, or has a gradient
    z, at_theta = layout.take(pre), layout.at(theta)
    on = z > at_theta
    f = z * on
    norm = p["decoder"].norm(dim=-1)
    error = layout.decode(f, p["decoder"]) + p["b_dec"] - batch.y
    g = error * (2 / batch.tokens)
    d_f = layout.dot(g, p["decoder"])
    d_on, d_f_penalty, pull, penalty = firing_costs(batch, config, weight, layout, f, on, norm)
    d_f = d_f + d_f_penalty
    window = ((z - at_theta).abs() < width / 2) / width  # K / eps
    through_step = window * (at_theta * d_f + d_on)
    d_z = d_f * on + (through_step if config.ste_to_input else 0)
    gradients, into = linear_gradients(batch, layout, f, d_z, g)
    gradients["threshold"] = -layout.sum(through_step)
    if pull is not None and config.decoder_norm is DecoderNorm.free:
        gradients["decoder"] = gradients["decoder"] + along_norm(p, pull)
    outcome = Outcome(error, layout.count(on), penalty, gradients, into)
    if config.preact > 0:
        outcome.into_encoder = into + wake(p, batch, config, pre, norm, gradients)
    return outcome


def firing_costs(
    batch: Batch, config: SaeConfig, weight: float, layout: Layout, f: Tensor, on: Tensor, norm: Tensor
) -> tuple[Tensor | float, Tensor | float, Tensor | None, Tensor]:
    """Gradients of the penalty: to 1[z > theta], to f, to |D_i|; and its sum over tokens."""
    share = weight / batch.tokens
    if config.penalty is Penalty.tanh:
        size = config.tanh_scale * layout.at(norm)
        bent = (size * f).tanh()
        slope = (1 - bent.square()) * share
        return 0.0, slope * size, layout.sum(slope * config.tanh_scale * f), bent.sum()
    ones = norm.new_ones(len(norm), 1)
    active = layout.decode(on.to(norm.dtype), ones)[:, 0]  # [n]
    if config.penalty is Penalty.step:
        return share, 0.0, None, active.sum()
    aim = float(config.target_l0 or 1)
    if config.penalty is Penalty.target:
        off = batch.group.all_reduce(active.sum()) / batch.tokens / aim - 1
        return 2 * share * off / aim, 0.0, None, off.square() * len(batch.x)
    off = active / aim - 1
    return layout.dot(2 * share / aim * off[:, None], ones), 0.0, None, off.square().sum()


def wake(p: Parameters, batch: Batch, config: SaeConfig, pre: Tensor, norm: Tensor, gradients: Parameters) -> Tensor:
    """Add the gradients of `preact / n sum over dead features of relu(theta - z) |D|` (Anthropic, January 2025).

    Returns:
        What it adds to the sum of d loss / d z, [d_sae].
    """
    dead = batch.dead.nonzero()[:, 0]
    below = p["threshold"][dead] - full_precision(pre[:, dead])  # [n, dead]
    share = config.preact / batch.tokens
    d_below = (below > 0) * (norm[dead] * share)
    into = norm.new_zeros(norm.shape).index_copy_(0, dead, -d_below.sum(0))
    more = {
        "encoder": gradients["encoder"]
        .new_zeros(gradients["encoder"].shape)
        .index_copy_(0, dead, -d_below.T @ batch.x),
        "b_enc": into,
        "threshold": -into,
    }
    if config.decoder_norm is DecoderNorm.free:
        pull = norm.new_zeros(norm.shape).index_copy_(0, dead, below.relu().sum(0) * share)
        more["decoder"] = along_norm(p, pull)
    add(gradients, more)
    return into


def penalty_weight(config: SaeConfig, d_out: int, variance: float) -> float:
    """Return `l0`."""
    return config.l0


def further_parameters(config: SaeConfig, n: int, device: torch.device) -> Parameters:
    """Return the thresholds, `theta`."""
    return {"threshold": torch.full((n,), config.theta, device=device)}


def fold(p: Parameters, cut: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return all as it is."""
    return p["encoder"], p["b_enc"], p["threshold"] * p["decoder"].norm(dim=-1).clamp_min(1e-12)


def unfold(bias: Tensor, threshold: Tensor) -> Parameters:
    """Return both as they are."""
    return {"b_enc": bias, "threshold": threshold}
