"""The losses of policy-gradient training as pure functions of tensors; `phase.py` alone adds them up.

Shapes: B completions of at most T tokens.
"""

import torch
from torch import Tensor


def clipped_surrogate(logp: Tensor, logp_old: Tensor, advantages: Tensor, cliprange: float) -> Tensor:
    """Compute PPO's loss `-min(ratio A, clip(ratio) A)` with `ratio = exp(logp - logp_old)` (Schulman et al. 2017).

    Args:
        logp: [B, T], log-probability of every token under the policy, nats; or [B], of every completion.
        logp_old: the same under the policy that sampled.
        advantages: of what can be broadcast to that.
        cliprange: epsilon, the ratio is held in [1 - epsilon, 1 + epsilon].

    Returns:
        The loss of every token, [B, T]; or of every completion, [B].
    """
    ratio = torch.exp(logp - logp_old)
    return -torch.min(ratio * advantages, ratio.clamp(1 - cliprange, 1 + cliprange) * advantages)


def clipped_value_loss(values: Tensor, values_old: Tensor, returns: Tensor, cliprange: float) -> Tensor:
    """Compute half the larger of the squared errors of the value and of the value held near its old one.

    Args:
        values: [B, T], of the state before every token, now.
        values_old: [B, T], when the completions were sampled.
        returns: [B, T], their targets.
        cliprange: farthest that a value counts as moved.

    Returns:
        [B, T].
    """
    held = values_old + (values - values_old).clamp(-cliprange, cliprange)
    return 0.5 * torch.max((values - returns) ** 2, (held - returns) ** 2)


def token_k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """Estimate every token's KL, unbiased and never negative: `exp(-x) - 1 + x`, x = logp - logp_ref (Schulman 2020).

    Args:
        logp: [B, T], under the policy that wrote the tokens.
        logp_ref: [B, T], under the reference.

    Returns:
        [B, T], nats.
    """
    log_ratio = logp_ref - logp
    return torch.exp(log_ratio) - log_ratio - 1
