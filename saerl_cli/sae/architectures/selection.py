"""Which features are the largest: of every token, or of a whole batch.

A sort of everything is what a sparse step would spend most of its time on, after the encoder. A bound that a sample
suggests leaves few candidates; where it leaves too few, everything is looked at: the result is always exact.
"""

import numpy
import torch
from torch import Tensor

from saerl_cli.run.processes import ProcessGroup
from saerl_cli.sae.layout import Sparse, full_precision, where

SAMPLE_ROWS = 256
"""Tokens from which the first guess of a batch's threshold is made."""
SAMPLE_COLUMNS = 16
"""The bound of a token is guessed from one in so many features."""
MOST_CANDIDATES = 6
"""As a multiple of what is wanted: beyond it the bound was useless."""


def largest_per_token(scores: Tensor, k: int) -> Tensor:
    """The k features of each token with the largest scores, in any order: [n, d_sae] -> indices [n, k].

    On a CPU, where k is no tiny share of d_sae, in about half the time of `torch.topk` (4,096 features, k 128), or
    three quarters (k 32).
    """
    d_sae = scores.shape[1]
    if scores.device.type == "cpu" and len(scores) > 0 and k >= 16 and 16 * k <= d_sae <= 128 * k:
        found = _among_candidates(scores, k)
        if found is not None:
            return found
    return scores.topk(k, dim=-1, sorted=False).indices


def _among_candidates(scores: Tensor, k: int) -> Tensor | None:
    """The same by way of a bound for every token; None where that leaves too many."""
    n, d_sae = scores.shape
    part = d_sae // SAMPLE_COLUMNS
    rank = -(-2 * k * part // d_sae)  # of the sample's scores, so that about 2k of all lie above
    bound = scores[:, :part].topk(rank, dim=-1, sorted=False).values.amin(1)  # [n]
    flat = torch.from_numpy(numpy.flatnonzero((scores >= bound[:, None]).numpy()))
    if len(flat) > MOST_CANDIDATES * k * n:
        return None
    ends = torch.searchsorted(flat, torch.arange(1, n + 1) * d_sae)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    count = ends - starts
    width = max(int(count.max()), k)
    token = flat // d_sae
    place = torch.arange(len(flat)) - starts[token] + token * width
    padded = scores.new_full((n * width,), float("-inf"))
    padded[place] = scores.view(-1)[flat]
    feature = torch.zeros(n * width, dtype=torch.long)
    feature[place] = flat - token * d_sae
    best = padded.view(n, width).topk(k, dim=-1, sorted=False).indices
    indices = feature.view(n, width).gather(1, best)
    poor = (count < k).nonzero()[:, 0]  # the bound was too high for them
    if len(poor):
        indices[poor] = scores[poor].topk(k, dim=-1, sorted=False).indices
    return indices


def select_in_batch(scores: Tensor, wanted: int, group: ProcessGroup) -> tuple[Sparse, Tensor]:
    """The pairs with the `wanted` largest positive scores over all processes, and the smallest score among them.

    Args:
        scores: [n, d_sae] of this process.
        wanted: pairs over all processes.
        group: the processes that share the batch.
    """
    candidates, found = likely(scores, wanted if group.world_size == 1 else None)
    if group.world_size > 1:
        largest = found.topk(min(wanted, len(found))).values
        shares = largest.new_zeros(group.world_size, wanted)
        shares[group.rank, : len(largest)] = largest
        everyone = group.all_reduce(shares).view(-1)
    else:
        everyone = found
    everyone = everyone[everyone > 0]
    if len(everyone) == 0:
        return candidates, full_precision(scores.new_zeros(()))
    threshold = everyone.topk(min(wanted, len(everyone)), sorted=False).values.min()
    kept = found >= threshold
    layout = Sparse(candidates.token[kept], candidates.feature[kept], candidates.tokens, candidates.d_sae)
    return layout, threshold


def likely(scores: Tensor, wanted: int | None) -> tuple[Sparse, Tensor]:
    """Pairs among which the `wanted` largest positive scores are, and their scores; all positive ones for None.

    A guess from a sample of the tokens leaves about twice as many pairs as wanted; where it leaves too few, all
    positive ones are taken. The result of a selection is the same; a sort of everything would cost ten times as much.
    """
    n, d_sae = scores.shape
    if wanted is not None and n > SAMPLE_ROWS:
        sample = scores[:: n // SAMPLE_ROWS]
        twice = min(2 * wanted * len(sample) // n, sample.numel())
        guess = sample.reshape(-1).topk(twice, sorted=False).values.min()
        if guess > 0:
            layout = where(scores >= guess)
            if len(layout.feature) >= wanted:
                return layout, layout.take(scores)
    layout = where(scores > 0)
    return layout, layout.take(scores)
