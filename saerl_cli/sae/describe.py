"""Which tokens a feature fires on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from saerl_cli.sae.autoencoder import SAE


@torch.no_grad()
def top_tokens(
    sae: SAE, activations: Tensor, token_ids: Tensor, n: int, features: Sequence[int] | None = None
) -> list[list[int]]:
    """Token ids by the summed activation of each feature on them, largest first.

    Args:
        sae: the autoencoder.
        activations: [tokens, d_in].
        token_ids: the token at each activation, [tokens].
        n: ids a feature at most; tokens that never fire it are left out, so a silent feature has none.
        features: which ones; all when None.
    """
    f = sae.encode(activations.to(sae.W_enc.dtype))  # [tokens, d_sae]
    chosen = f if features is None else f[:, list(features)]  # [tokens, features]
    ids, column = token_ids.unique(return_inverse=True)
    totals = chosen.new_zeros(len(ids), chosen.shape[1]).index_add_(0, column, chosen)  # [distinct ids, features]
    best = totals.topk(min(n, len(ids)), dim=0)
    return [
        [int(ids[i]) for i, total in zip(indices, values, strict=True) if total > 0]
        for indices, values in zip(best.indices.T.tolist(), best.values.T.tolist(), strict=True)
    ]
