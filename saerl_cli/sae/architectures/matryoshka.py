"""BatchTopK whose prefixes reconstruct too."""

import torch
from torch import Tensor

from saerl_cli.config.sae import SaeConfig
from saerl_cli.sae.architectures import batchtopk
from saerl_cli.sae.architectures.common import Batch, Outcome, Parameters, pre_activations
from saerl_cli.sae.architectures.selection import select_in_batch
from saerl_cli.sae.architectures.topk import auxiliary
from saerl_cli.sae.layout import Sparse

SAVED_AS, fold, unfold = batchtopk.SAVED_AS, batchtopk.fold, batchtopk.unfold
penalty_weight, further_parameters = batchtopk.penalty_weight, batchtopk.further_parameters


def loss(p: Parameters, batch: Batch, config: SaeConfig, weight: float) -> Outcome:
    """The loss `matryoshka` of `saerl_cli.sae.architectures`.

    The features are cut into groups at the ends of the prefixes. A pair (token, group) is decoded on its own; the
    prefixes' reconstructions are running sums over groups, and what a group's features get is the sum over all
    prefixes that contain it.
    """
    norm = p["decoder"].norm(dim=-1)
    scores = pre_activations(p, batch, config.encoder_dtype, norm)
    tokens, cut = select_in_batch(scores, config.k * batch.tokens, batch.group)
    bags, groups = by_group(tokens, config.prefixes)
    values = tokens.take(scores).relu() / tokens.at(norm.clamp_min(1e-12))
    parts = bags.decode(values, p["decoder"]).view(tokens.tokens, groups, batch.y.shape[1])
    errors = parts.cumsum(1) + (p["b_dec"] - batch.y)[:, None]  # [n, groups, d_out]
    each = errors * (2 / batch.tokens)
    g = (
        each.flip(1).cumsum(1).flip(1).reshape(tokens.tokens * groups, batch.y.shape[1])
    )  # of this prefix and all longer ones
    d_values = bags.dot(g, p["decoder"]) * (values > 0)
    into = tokens.sum(d_values)
    gradients = {
        "encoder": tokens.by_feature(d_values, batch.x),
        "b_enc": into,
        "decoder": bags.by_feature(values, g),
        "b_dec": each.sum((0, 1)),
    }
    error = errors[:, -1]
    if config.auxk > 0:
        into = into + auxiliary(p, batch, config, scores, norm, error, gradients)
    return Outcome(error, tokens.count(values > 0), error.new_zeros(()), gradients, into, cut)


def by_group(layout: Sparse, prefixes: list[float]) -> tuple[Sparse, int]:
    """The same pairs under bags (token, group) in the place of tokens, and how many groups there are."""
    ends = prefix_ends(prefixes, layout.d_sae)
    edges = torch.tensor(ends[:-1], device=layout.feature.device, dtype=layout.feature.dtype)
    group = torch.bucketize(layout.feature, edges, right=True)
    bag: Tensor = layout.token * len(ends) + group  # not falling: pairs of a token are ordered by feature
    return Sparse(bag, layout.feature, layout.tokens * len(ends), layout.d_sae), len(ends)


def prefix_ends(prefixes: list[float], d_sae: int) -> list[int]:
    """Features in each prefix, at least one and each more than the last."""
    ends: list[int] = []
    for share in prefixes:
        end = max(1, round(share * d_sae))
        if not ends or end > ends[-1]:
            ends.append(end)
    return ends
