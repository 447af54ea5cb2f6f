"""Gated: the encoder decides what fires, and a scaled and shifted copy of it how much."""

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


def gated(p: Parameters, batch: Batch, config: SaeConfig, weight: float) -> Outcome:
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
