"""What the losses of all architectures share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from saerl_cli.config.sae import EncoderDtype, SaeConfig
from saerl_cli.run.processes import ONE_PROCESS, ProcessGroup
from saerl_cli.sae.layout import Layout, Scratch

Parameters = dict[str, Tensor]
"""encoder [d_sae, d_in], b_enc [d_sae], decoder [d_sae, d_out], b_dec [d_out]; threshold (jumprelu), r_mag and b_mag
(gated), all [d_sae]."""


@dataclass(frozen=True)
class Batch:
    """This process's share of a batch, scaled."""

    x: Tensor
    """Centred inputs, [n, d_in]."""
    y: Tensor
    """What is to be reconstructed, [n, d_out]."""
    tokens: int
    """Of all processes together, over which the loss is averaged."""
    dead: Tensor
    """Features that are dead, bool [d_sae]."""
    group: ProcessGroup = ONE_PROCESS
    scratch: Scratch = field(default_factory=Scratch)
    """Memory for the pre-activations."""


@dataclass
class Outcome:
    """Gradients of the loss, and what happened."""

    error: Tensor
    """x^ - y, [n, d_out]."""
    fires: Tensor
    """Tokens of this process on which each feature fired, [d_sae]."""
    penalty: Tensor
    """Sum over this process's tokens, without its weight."""
    gradients: Parameters
    """By parameter, over this process's tokens; that of b_dec leaves out the way through the encoder."""
    into_encoder: Tensor
    """Sum over tokens of d loss / d (x_c W^T), [d_sae]: from it follows what b_dec gets through the encoder."""
    cut: Tensor | None = None
    """The smallest z |D| that was kept (batchtopk, matryoshka)."""


class Parts(Protocol):
    """What the file of an architecture holds."""

    SAVED_AS: str
    """`standard`, `topk` or `jumprelu`: what it is once it is trained."""
    loss: Callable[[Parameters, Batch, SaeConfig, float], Outcome]
    """loss(parameters, batch, settings, weight of the penalty)."""
    penalty_weight: Callable[[SaeConfig, int, float], float]
    """penalty_weight(settings, d_out, variance of the targets): its peak; 0 without a penalty."""
    further_parameters: Callable[[SaeConfig, int, torch.device], Parameters]
    """further_parameters(settings, n, device): those beside encoder, b_enc, decoder and b_dec of n features, [n] each,
    at the start and where dead features begin anew."""
    fold: Callable[[Parameters, Tensor], tuple[Tensor, Tensor, Tensor]]
    """fold(parameters, cut): encoder [d_sae, d_in], bias [d_sae] and threshold of z |D| [d_sae] of the form that is
    saved; `cut` is the last `Outcome.cut`."""
    unfold: Callable[[Tensor, Tensor], Parameters]
    """unfold(bias, threshold): the parameters of one number a feature that fold to these, with the same encoder."""


def pre_activations(p: Parameters, batch: Batch, dtype: EncoderDtype, norm: Tensor | None = None) -> Tensor:
    """`x W^T + b_enc`, each feature times its `norm` [d_sae] if given: [n, d_in] -> [n, d_sae].

    In bfloat16 the product is rounded, and so is the result; weights and their gradients are not. The result lies in
    the batch's scratch memory.
    """
    x, encoder, bias = batch.x, p["encoder"], p["b_enc"]
    if norm is not None:
        encoder, bias = encoder * norm[:, None], bias * norm
    if dtype is EncoderDtype.bfloat16:
        x, encoder, bias = x.bfloat16(), encoder.bfloat16(), bias.bfloat16()
    return torch.addmm(bias, x, encoder.T, out=batch.scratch.matrix(len(x), len(bias), x))


def linear_gradients(
    batch: Batch, layout: Layout, values: Tensor, d_pre: Tensor, g: Tensor
) -> tuple[Parameters, Tensor]:
    """Gradients of encoder, b_enc, decoder and b_dec from those of the pre-activations.

    Args:
        batch: the batch.
        layout: of `values` and `d_pre`.
        values: what is decoded.
        d_pre: d loss / d z.
        g: d loss / d x^, [n, d_out].

    Returns:
        The four gradients, and the sum of `d_pre` over tokens, [d_sae].
    """
    into = layout.sum(d_pre)
    gradients = {
        "encoder": layout.by_feature(d_pre, batch.x),
        "b_enc": into,
        "decoder": layout.by_feature(values, g),
        "b_dec": g.sum(0),
    }
    return gradients, into


def add(total: Parameters, more: Parameters) -> None:
    """Add gradients to gradients."""
    for name, gradient in more.items():
        total[name] = total[name] + gradient


def along_norm(p: Parameters, weights: Tensor) -> Tensor:
    """Gradient of `sum_i weights_i |D_i|` with respect to D: [d_sae] -> [d_sae, d_out]."""
    norm = p["decoder"].norm(dim=-1).clamp_min(1e-12)
    return p["decoder"] * (weights / norm)[:, None]
