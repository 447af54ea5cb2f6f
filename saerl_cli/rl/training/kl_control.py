"""The KL coefficient that leads a run to a given KL from its reference."""

import math

LOWEST, HIGHEST = 1e-6, 1e3
"""Bounds of the coefficient: at 0 there would be no reference to compare with."""


def next_coefficient(coef: float, kl: float, before: float, target: float, gain: float = 3.0) -> float:
    """The KL coefficient of the next phase, by a proportional-integral rule on logarithms.

    `log beta += gain * (e_t - e_{t-1}) + gain / 4 * i_t` with `e = clip(log(kl / target), -1.5, 1.5)` and `i = min(e,
    0.5)`, but 0 where e < -0.5: a KL that is still on its way up must not wind the coefficient down, or it overshoots.

    Args:
        coef: beta of the phase.
        kl: its sequence KL, nats per completion.
        before: that of the phase before; the target before there was one, so that the first coefficient is the one
            meant for a KL that is where it should be.
        target: the wished-for KL, nats per completion.
        gain: of the proportional part; the integral part has a quarter of it.

    Returns:
        A coefficient in [LOWEST, HIGHEST].
    """
    now, then = error(kl, target), error(before, target)
    lasting = min(now, 0.5) if now > -0.5 else 0.0
    return min(max(coef * math.exp(gain * (now - then) + gain / 4 * lasting), LOWEST), HIGHEST)


def error(kl: float, target: float) -> float:
    """log(kl / target), held within a factor of 4.5; an estimate of the KL may be 0 or negative."""
    return min(max(math.log(max(kl, 1e-9) / target), -1.5), 1.5)
