"""The mathematics of PPO as pure functions of tensors; the trainer only calls them.

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


def clipped_surrogate(logp: Tensor, logp_old: Tensor, advantages: Tensor, cliprange: float) -> Tensor:
    """PPO's loss of every token, `-min(ratio A, clip(ratio) A)` (Schulman et al. 2017); [B, T].

    The trainer uses TRL's implementation; this is what it is tested against.
    """
    ratio = torch.exp(logp - logp_old)
    return -torch.min(ratio * advantages, ratio.clamp(1 - cliprange, 1 + cliprange) * advantages)


def clipped_value_loss(values: Tensor, values_old: Tensor, returns: Tensor, cliprange: float) -> Tensor:
    """Half the larger of the squared errors of the value and of the value held near its old one; [B, T]."""
    held = values_old + (values - values_old).clamp(-cliprange, cliprange)
    return 0.5 * torch.max((values - returns) ** 2, (held - returns) ** 2)


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
