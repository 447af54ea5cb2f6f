"""Which tokens a feature fires on."""

from torch import Tensor


def top_tokens(f: Tensor, token_ids: Tensor, n: int) -> list[list[int]]:
    """List token ids by the summed activation of each feature on them, largest first.

    Args:
        f: activations, [tokens, features].
        token_ids: the token at each activation, [tokens].
        n: ids a feature at most; tokens that never fire it are left out, so a silent feature has none.
    """
    ids, column = token_ids.unique(return_inverse=True)
    totals = f.new_zeros(len(ids), f.shape[1]).index_add_(0, column, f)  # [distinct ids, features]
    best = totals.topk(min(n, len(ids)), dim=0)
    return [
        [int(ids[i]) for i, total in zip(indices, values, strict=True) if total > 0]
        for indices, values in zip(best.indices.T.tolist(), best.values.T.tolist(), strict=True)
    ]
