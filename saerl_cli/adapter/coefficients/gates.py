"""Hard-concrete gates (Louizos, Welling and Kingma 2018): numbers in [0, 1] that are exactly 0 with some probability.

    z = clamp(s * (HIGH - LOW) + LOW, 0, 1),   s = sigmoid((noise + log_alpha) / BETA)      in training
                                               s = sigmoid(log_alpha)                      in evaluation

with logistic noise, log u - log(1 - u). The chance that z is not 0 is sigmoid(log_alpha - BETA * log(-LOW / HIGH)).
"""

import math

import torch
from torch import Tensor

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1
INITIAL = math.log(0.9 / 0.1)
"""log_alpha at the start: the authors' code takes the logit of the probability to keep, here 0.9."""


def gate(log_alpha: Tensor, noise: Tensor | None = None) -> Tensor:
    """Gates, [n]; with the noise of training, or as in evaluation."""
    s = (log_alpha if noise is None else (noise + log_alpha) / BETA).sigmoid()
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


def expected_open(log_alpha: Tensor) -> Tensor:
    """For every gate, [n], the chance that it is not 0."""
    return (log_alpha - BETA * math.log(-LOW / HIGH)).sigmoid()


def logistic_noise(size: int, generator: torch.Generator) -> Tensor:
    """Noise for so many gates, [size], on the CPU."""
    u = torch.rand(size, generator=generator).clamp(1e-6, 1 - 1e-6)
    return u.log() - (1 - u).log()
