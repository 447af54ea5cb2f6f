"""How far the coefficients and attributions of two runs agree."""

from torch import Tensor


def ranks(values: Tensor) -> Tensor:
    """Ranks from 0, equal values their mean rank: [n] -> [n], float64."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)  # sorted
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() + 1) / 2)[inverse]


def spearman(x: Tensor, y: Tensor) -> float | None:
    """Rank correlation of two vectors; None where one of them is constant."""
    a, b = (r - r.mean() for r in (ranks(x), ranks(y)))
    scale = float((a.norm() * b.norm()).item())
    return float((a @ b).item()) / scale if scale > 0 else None


def top_overlap(x: Tensor, y: Tensor, k: int) -> float:
    """Share of the k features with the largest |x| that are among the k with the largest |y|."""
    first, second = (set(v.abs().topk(min(k, len(v))).indices.tolist()) for v in (x, y))
    return len(first & second) / max(1, len(first))
