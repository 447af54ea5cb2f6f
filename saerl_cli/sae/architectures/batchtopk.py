"""BatchTopK: the k n largest of a batch of n tokens; saved as a JumpReLU with the cut of the last batch."""

import torch
from torch import Tensor

from saerl_cli.config.sae import SaeConfig
from saerl_cli.sae.architectures import topk
from saerl_cli.sae.architectures.common import Batch, Outcome, Parameters, pre_activations
from saerl_cli.sae.architectures.selection import select_in_batch

SAVED_AS = "jumprelu"
penalty_weight, further_parameters, unfold = topk.penalty_weight, topk.further_parameters, topk.unfold


def loss(p: Parameters, batch: Batch, config: SaeConfig, weight: float) -> Outcome:
    """The loss `batchtopk` of `saerl_cli.sae.architectures`."""
    norm = p["decoder"].norm(dim=-1)
    scores = pre_activations(p, batch, config.encoder_dtype, norm)
    layout, cut = select_in_batch(scores, config.k * batch.tokens, batch.group)
    outcome = topk.reconstruction(p, batch, config, layout, scores, norm)
    outcome.cut = cut
    return outcome


def fold(p: Parameters, cut: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number just below the cut of z |D| as the threshold: kept were scores >= cut."""
    return p["encoder"], p["b_enc"], torch.nextafter(cut, torch.zeros_like(cut)).expand_as(p["b_enc"])
