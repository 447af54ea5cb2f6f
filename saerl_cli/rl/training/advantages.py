"""From scores to advantages, as pure functions of tensors; `phase.py` calls them in order.

Shapes: B completions of at most T tokens. `mask` [B, T] is 1 on kept tokens (a prefix of every row), 0 after the end.
Tokens after the end are 0 in every result.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes; the identity for one process."""


def token_rewards(score: Tensor, logp: Tensor, logp_ref: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards of every token: `-kl_coef * (logp - logp_ref)`, plus the score on the last kept token.

    Args:
        score: [B], the score of a whole completion.
        logp: [B, T], log-probability of each token under the sampling policy, nats.
        logp_ref: [B, T], the same under the reference.
        mask: [B, T].
        kl_coef: beta.

    Returns:
        [B, T]. A completion without a kept token gets no score.
    """
    rewards = -kl_coef * (logp - logp_ref) * mask
    kept = mask.sum(1).long()
    last = (kept - 1).clamp(min=0)
    rows = torch.arange(len(score), device=score.device)
    rewards[rows, last] += score.to(rewards.dtype) * (kept > 0)
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016) of episodes that end with their last kept token.

    `A_t = r_t + gamma V_{t+1} - V_t + gamma lam A_{t+1}`, with V and A zero after the end.

    Args:
        rewards: [B, T].
        values: [B, T], V of the state before each token.
        mask: [B, T].
        gamma: discount.
        lam: lambda.

    Returns:
        Advantages [B, T] and returns `A + V` [B, T].
    """
    values = values * mask
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    errors = rewards + gamma * following - values
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        running = (errors[:, t] + gamma * lam * running) * mask[:, t]
        advantages[:, t] = running
    return advantages, advantages + values


def whiten(x: Tensor, mask: Tensor, reduce: Reduce = lambda t: t) -> Tensor:
    """Mean 0 and variance 1 over the kept tokens of all processes; [B, T] to [B, T], 0 after the end."""
    x64, mask64 = x.double() * mask, mask.double()
    total, square, count = reduce(torch.stack([x64.sum(), x64.pow(2).sum(), mask64.sum()]))
    mean = total / count.clamp(min=1)
    variance = (square / count.clamp(min=1) - mean**2).clamp(min=0)
    return ((x64 - mean) * torch.rsqrt(variance + 1e-8) * mask64).to(x.dtype)


def group_advantages(scores: Tensor, group: int, scale: bool) -> Tensor:
    """Compare each completion with its prompt's others: `r - mean`, divided by `std + 1e-4` (Shao et al. 2024).

    Args:
        scores: [prompts * group], those of a prompt next to each other.
        group: completions a prompt.
        scale: divide by the group's standard deviation.

    Returns:
        [prompts * group].
    """
    grouped = scores.view(-1, group)
    advantages = grouped - grouped.mean(1, keepdim=True)
    if scale:
        advantages = advantages / (grouped.std(1, keepdim=True) + 1e-4)
    return advantages.view(-1)


def leave_one_out(scores: Tensor, group: int) -> Tensor:
    """Compare each completion with the mean of its prompt's others (Ahmadian et al. 2024).

    Args:
        scores: [prompts * group], those of a prompt next to each other.
        group: completions a prompt, at least 2.

    Returns:
        [prompts * group].
    """
    grouped = scores.view(-1, group)
    others = (grouped.sum(1, keepdim=True) - grouped) / (group - 1)
    return (grouped - others).view(-1)


def k1(logp: Tensor, logp_ref: Tensor, mask: Tensor) -> Tensor:
    """Unbiased estimate of the sequence KL(policy || reference) under policy samples, nats per completion; [B]."""
    return ((logp - logp_ref) * mask).sum(1)


def k3(logp: Tensor, logp_ref: Tensor, mask: Tensor) -> Tensor:
    """Non-negative estimate `exp(-x) - 1 + x` of each token's KL, x = logp - logp_ref, summed; [B] (Schulman 2020)."""
    log_ratio = (logp - logp_ref) * mask
    return torch.expm1(-log_ratio).add(log_ratio).sum(1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, reduce: Reduce = lambda t: t) -> float:
    """`1 - var(returns - values) / var(returns)` over the kept tokens of all processes; 0 for constant returns."""
    keep = mask.double()
    error, target = (returns - values).double() * keep, returns.double() * keep
    sums = [error.sum(), error.pow(2).sum(), target.sum(), target.pow(2).sum(), keep.sum()]
    e, ee, r, rr, n = reduce(torch.stack(sums)).tolist()
    n = max(n, 1.0)
    variance = rr / n - (r / n) ** 2
    return 1 - (ee / n - (e / n) ** 2) / variance if variance > 1e-12 else 0.0
