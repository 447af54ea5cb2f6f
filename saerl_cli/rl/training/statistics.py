"""The statistics of a phase, as pure functions of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from saerl_cli.rl.evaluation.behaviour import tail


def reward_statistics(raw: Tensor, weights: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Describe the reward as it was given, before normalising.

    Args:
        raw: [completions, parts].
        weights: [parts].
        names: of the parts.
    """
    total = raw @ weights
    found = tail(total.tolist())
    tails = {"reward_kurtosis": "kurtosis", "reward_hill": "hill", "reward_top_share": "top_share"}
    return {
        "reward": total.mean().item(),
        "reward_std": total.std().item(),
        **{name: value for name, key in tails.items() if (value := found[key]) is not None},
        **{f"reward/{name}": value for name, value in zip(names, raw.mean(0).tolist(), strict=True)},
    }


def length_and_kl(rows: Tensor, exact: Tensor, ended: Tensor) -> dict[str, float]:
    """Describe how long completions are and how far the policy is from its reference.

    Args:
        rows: [completions, 3]: KL by k1 and by k3 (nats) and length (tokens) of each.
        exact: exact KL of some completions, nats.
        ended: [completions], 1 where an end token came.
    """
    kl, kl_k3, length = rows.mean(0).tolist()
    return {
        "kl": kl,
        "kl_k3": kl_k3,
        "kl_exact": exact.mean().item(),
        "length": length,
        "ended": ended.mean().item(),
        "tokens": rows[:, 2].sum().item(),
        "episodes": len(rows),
    }


@torch.no_grad()
def update_sums(
    mask: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    cliprange: float,
    entropy: Tensor,
    value_losses: Tensor | None,
) -> Tensor:
    """Add up, over the tokens of a micro-batch, what `update_means` turns into means.

    Args:
        mask: [B, T].
        log_ratio: [B, T], log-probability under the policy less that under the one that sampled.
        advantages: [B, T] or [B, 1].
        cliprange: of the ratio.
        entropy: [B, T].
        value_losses: [B, T], where there is a critic.

    Returns:
        [5] or [6]: tokens, then sums of k3, clipped, |ratio - 1|, entropy and the value loss.
    """
    ratio = log_ratio.exp()
    clipped = ((ratio < 1 - cliprange) & (advantages < 0)) | ((ratio > 1 + cliprange) & (advantages > 0))
    columns = [ratio - 1 - log_ratio, clipped, (ratio - 1).abs(), entropy, value_losses]
    sums = [(column * mask).sum().float() for column in columns if column is not None]
    return torch.stack([mask.sum().float(), *sums])


def update_means(sums: Tensor) -> dict[str, float]:
    """Average over the tokens of a phase's updates."""
    tokens, *rest = sums.tolist()
    names = ("approx_kl", "clip_fraction", "ratio_deviation", "entropy", "value_loss")
    return {name: total / max(tokens, 1) for name, total in zip(names, rest, strict=False)}
