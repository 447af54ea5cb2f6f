"""TopK, and what its relatives share: the reconstruction, and the auxiliary loss that revives dead features."""

import torch
from torch import Tensor

from saerl_cli.config.sae import SaeConfig
from saerl_cli.sae.architectures import relu
from saerl_cli.sae.architectures.common import Batch, Outcome, Parameters, add, linear_gradients, pre_activations
from saerl_cli.sae.architectures.selection import largest_per_token
from saerl_cli.sae.layout import Dense, Layout, Sparse, full_precision, rows_of
from saerl_cli.sae.presets import auxk_weight

SAVED_AS = "topk"
further_parameters, fold, unfold = relu.further_parameters, relu.fold, relu.unfold


def loss(p: Parameters, batch: Batch, config: SaeConfig, weight: float) -> Outcome:
    """The loss `topk` of `saerl_cli.sae.architectures`."""
    norm = p["decoder"].norm(dim=-1)
    scores = pre_activations(p, batch, config.encoder_dtype, norm)
    layout = rows_of(largest_per_token(scores, config.k), len(norm))
    return reconstruction(p, batch, config, layout, scores, norm)


def penalty_weight(config: SaeConfig, d_out: int, variance: float) -> float:
    """Return 0: what fires is counted, not paid for."""
    return 0.0


def reconstruction(
    p: Parameters, batch: Batch, config: SaeConfig, layout: Sparse, scores: Tensor, norm: Tensor
) -> Outcome:
    """Error and gradients for the chosen pairs, with the auxiliary loss where there are dead features."""
    values = layout.take(scores).relu() / layout.at(norm.clamp_min(1e-12))
    error = layout.decode(values, p["decoder"]) + p["b_dec"] - batch.y
    g = error * (2 / batch.tokens)
    d_values = layout.dot(g, p["decoder"]) * (values > 0)
    gradients, into = linear_gradients(batch, layout, values, d_values, g)
    if config.auxk > 0:
        into = into + auxiliary(p, batch, config, scores, norm, error, gradients)
    return Outcome(error, layout.count(values > 0), error.new_zeros(()), gradients, into)


# --- dead features ---------------------------------------------------------------------------------------------------


def auxiliary(
    p: Parameters, batch: Batch, config: SaeConfig, scores: Tensor, norm: Tensor, error: Tensor, gradients: Parameters
) -> Tensor:
    """Add the gradients of reconstructing the error with dead features (AuxK, Gao et al. 2024).

        auxk * V / V_res * 1/n sum |r - sum_j z_j D_j|^2,    r = y - x^, held constant

    over the `auxk_latents` dead features with the largest z_j |D_j|; V and V_res are the variances of y and r, which
    `auxk_unit` can leave out. The pre-activations enter as they are, negative ones too: behind a ReLU (`auxk_relu`, as
    in that paper's code) a feature that is negative everywhere gets no gradient.

    Returns:
        What it adds to the sum of d loss / d z, [d_sae].
    """
    dead = batch.dead.nonzero()[:, 0]  # [dead]
    nothing = torch.zeros_like(norm)
    if len(dead) == 0:
        return nothing
    latents = min(config.auxk_latents or max(1, batch.x.shape[1] // 2), len(dead))
    scaled = scores[:, dead]  # [n, dead]
    best = scaled.topk(latents, dim=-1, sorted=False).indices
    layout, values = chosen(full_precision(scaled) / norm[dead].clamp_min(1e-12), best)
    values = values.relu() if config.auxk_relu else values
    decoder = p["decoder"][dead]
    weight = auxk_weight(config, variance(batch.y, batch), variance(error, batch).clamp_min(1e-30))
    rest = error + layout.decode(values, decoder)  # -(r - r^), [n, d_out]
    g = rest * (2 / batch.tokens * weight)
    d_values = layout.dot(g, decoder) * (values != 0)
    parts, into = linear_gradients(batch, layout, values, d_values, g)
    spread = {name: torch.zeros_like(gradients[name]).index_copy_(0, dead, parts[name]) for name in BY_FEATURE}
    add(gradients, spread)
    return nothing.index_copy_(0, dead, into)


BY_FEATURE = ("encoder", "b_enc", "decoder")


def chosen(values: Tensor, best: Tensor) -> tuple[Layout, Tensor]:
    """Layout and values of the chosen columns `best` [n, k] of `values` [n, dead]."""
    n, dead = values.shape
    if best.shape[1] * 8 < dead:
        layout = rows_of(best, dead)
        return layout, layout.take(values)
    return Dense(), torch.zeros_like(values).scatter_(1, best, values.gather(1, best))


def variance(rows: Tensor, batch: Batch) -> Tensor:
    """Mean squared distance of all processes' rows [n, d] from their mean."""
    total = batch.group.all_reduce
    mean = total(rows.sum(0)) / batch.tokens
    return total((rows - mean).square().sum()) / batch.tokens
