"""Reward against KL: the limit that no policy can pass, best-of-n, and what a method reaches of it at equal KL.

Everything is a pure function of numbers. Rewards of the base model come as an array [prompts, samples]; KL is that of
whole completions, nats. A gain is a mean reward minus the base model's on the same prompts.

The limit. Among all policies with KL(pi || pi_ref) <= kappa, averaged over prompts, pi*(y|x) = pi_ref(y|x)
exp(r(x, y) / beta) / Z_x has the highest reward, with one beta for all prompts. By duality

    reward*(kappa) = min over beta of  beta kappa + E_x[beta log Z_x],    Z_x = E_y[exp(r / beta)]

and its slope in kappa is beta. The minimum is where KL*(beta) = kappa, with w = exp(r / beta), reward*(beta) = E[r w] /
E[w] and KL*(beta) = reward*/beta - log E[w]; only log Z_x has to be estimated from samples.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MIN_ESS = 5.0
"""Effective samples a prompt below which the limit is called unreliable. With Gaussian and Poisson rewards the gain is
then within 2 % of the truth; at 3 it is 6 % too small."""
BETAS = np.geomspace(1e-3, 1e2, 160)
"""Temperatures of the tilt, in standard deviations of the reward: 0.1 % of the gain lies between two of them."""

Rewards = NDArray[np.float64]
"""Rewards of samples of the base model, [prompts, samples]."""
Terms = Callable[[float, "Tilted"], tuple[NDArray[np.float64], float]]
"""`f(beta, tilted rows)` -> the dual function's contributions of the prompts [prompts], and the ESS."""


# --- the KL-optimal policy -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tilted:
    """Each row of rewards under weights exp(r / beta); all [rows]."""

    reward: NDArray[np.float64]
    """E[r w] / E[w]."""
    kl: NDArray[np.float64]
    """reward / beta - log E[w], nats."""
    log_z: NDArray[np.float64]
    """log E[w], a delete-one jackknife over the row's samples against its bias; `reward` and `kl` are plain."""
    ess: NDArray[np.float64]
    """Effective samples (sum w)^2 / sum w^2, between 1 and their number."""


def tilted(rewards: Rewards, beta: float) -> Tilted:
    """Rows of rewards [rows, samples] as seen by the policy that exp(r / beta) makes of the one that drew them.

    log of a mean of K weights is too small on average (Jensen); the jackknife K log Z - (K - 1) mean_j log Z_(-j) takes
    the part of order 1/K away (Efron 1982).
    """
    r = -np.sort(-rewards, axis=1)  # the largest first: weight 1 after the shift, so that no sum below vanishes
    a = (r - r[:, :1]) / beta
    w = np.exp(a)
    total, count = w.sum(1), r.shape[1]
    reward, log_z = (w * r).sum(1) / total, np.log(total / count)
    ess, shift = total**2 / (w**2).sum(1), r[:, 0] / beta
    kl = np.maximum((reward - r[:, 0]) / beta - log_z, 0.0)
    if count > 1:
        without_first = a[:, 1] + np.log(np.exp(a[:, 1:] - a[:, 1:2]).sum(1))
        without = without_first + np.log(total[:, None] - w[:, 1:]).sum(1) - count * math.log(count - 1)
        log_z = count * log_z - (count - 1) / count * without
    return Tilted(reward, kl, log_z + shift, ess)


@dataclass(frozen=True)
class LimitPoint:
    """The limit at one KL."""

    kl: float
    gain: float
    gain_se: float
    """Over prompts, at this KL."""
    beta: float
    """Slope of the limit here."""
    ess: float
    """Effective samples a prompt, averaged over prompts; of all samples together where they are pooled."""

    @property
    def reliable(self) -> bool:
        """Whether enough samples carry the estimate."""
        return self.ess >= MIN_ESS


@dataclass(frozen=True)
class Limit:
    """The highest gain at any KL, as the dual function of its slope; all [betas]."""

    betas: NDArray[np.float64]
    duals: NDArray[np.float64]
    """E_x[beta log Z_x] - E[r]."""
    errors: NDArray[np.float64]
    """Standard error of `duals` over prompts: by the envelope theorem that of the gain at a fixed KL."""
    ess: NDArray[np.float64]

    def at(self, kl: float) -> LimitPoint:
        """The limit at a KL >= 0."""
        bounds = self.betas * kl + self.duals
        i = int(bounds.argmin())
        return LimitPoint(
            kl, max(float(bounds[i]), 0.0), float(self.errors[i]), float(self.betas[i]), float(self.ess[i])
        )


def kl_optimum(rewards: Rewards) -> Limit:
    """The limit for policies that answer every prompt: weights are normalised prompt by prompt.

    The estimate is biased low, because even the best of K samples is finite: without the jackknife provably so
    (E[log Z] of samples < log Z, at every beta, hence their minimum too), with it by about 1.5 % at `MIN_ESS`. K
    samples a prompt cannot show a KL beyond log K, and reliably show one of about log K - 2.

    Args:
        rewards: [prompts, samples], samples >= 2.

    Raises:
        ValueError: a single sample a prompt, or rewards that do not differ.
    """
    if rewards.shape[1] < 2:
        raise ValueError("the KL-optimal policy needs at least 2 base samples a prompt")
    own = rewards.mean(1)
    return dual(rewards, lambda beta, t: (beta * t.log_z - own, float(t.ess.mean())), rewards)


def pooled_optimum(rewards: Rewards) -> Limit:
    """The limit if a policy could also choose which prompts it gets: weights are normalised over all samples.

    Never below `kl_optimum` but for noise, and far above it where prompts differ in reward. It reaches further, to
    about log(prompts x samples) - 2: an efficiency against it is a lower bound where the other is not to be had.

    Args:
        rewards: [prompts, samples].

    Raises:
        ValueError: rewards that do not differ.
    """
    own = rewards.mean(1)

    def terms(beta: float, t: Tilted) -> tuple[NDArray[np.float64], float]:
        largest = rewards.max()
        z = np.exp((rewards - largest) / beta).mean(1)  # [prompts], up to a factor
        influence = beta * (z / z.mean() - 1) - (own - own.mean())
        return beta * float(t.log_z[0]) - own.mean() + influence, float(t.ess[0])

    return dual(rewards, terms, rewards.reshape(1, -1))


def dual(rewards: Rewards, terms: Terms, rows: Rewards) -> Limit:
    """The limit from the terms of its dual function, over `BETAS`."""
    scale = float((rewards - rewards.mean(1, keepdims=True)).std())
    if scale == 0:
        raise ValueError("the base samples of every prompt have one and the same reward: there is nothing to gain")
    found = [terms(beta, tilted(rows, beta)) for beta in scale * BETAS]
    parts = np.stack([part for part, _ in found])  # [betas, prompts]
    prompts = parts.shape[1]
    errors = parts.std(1, ddof=1) / math.sqrt(prompts) if prompts > 1 else np.zeros(len(parts))
    return Limit(scale * BETAS, parts.mean(1), errors, np.array([ess for _, ess in found]))


# --- best-of-n -------------------------------------------------------------------------------------------------------


def best_of_n(rewards: Rewards) -> list[dict[str, float]]:
    """Best-of-n from the base samples, n = 1, 2, 4, ... up to all of them.

    The mean over all subsets of n of a prompt's K samples, sum_i C(i - 1, n - 1) / C(K, n) r_(i), is an unbiased
    estimate of E[max of n]. Its KL is at most log n - (n - 1) / n (Beirami et al. 2024), exactly that without ties.

    Returns:
        For every n: n, kl (the bound), gain, gain_se (over prompts).
    """
    r, count = np.sort(rewards, axis=1), rewards.shape[1]
    points, n = [], 1
    while n <= count:
        weights = np.array([math.comb(i, n - 1) / math.comb(count, n) for i in range(count)])
        gain = r @ weights - r.mean(1)  # [prompts]
        error = float(gain.std(ddof=1)) / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
        points.append({"n": n, "kl": math.log(n) - (n - 1) / n, "gain": float(gain.mean()), "gain_se": error})
        n *= 2
    return points


# --- what a method reaches -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    se: float


def efficiency(gain: float, gain_se: float, kl: float, kl_se: float, limit: Limit) -> Estimate | None:
    """Gain as a share of the limit's at the same KL; None where that is not to be had.

    That is: the limit is unreliable at this KL, allows no gain, or the KL cannot be told from 0 (two standard errors).

    The error (delta method) has the method's gain, its KL through the slope of the limit, and the limit's own; that
    gain and KL come from the same samples is left out.
    """
    best = limit.at(kl)
    if not best.reliable or best.gain <= 0 or kl <= 2 * kl_se:
        return None
    value = gain / best.gain
    errors = (gain_se, value * best.beta * kl_se, value * best.gain_se)
    return Estimate(value, math.hypot(*errors) / best.gain)


def hull(points: Sequence[Mapping[str, float]]) -> list[tuple[float, float, float]]:
    """A method's own frontier: the corners of the smallest concave, non-decreasing curve above its points.

    A chord is attainable: drawing each completion from one of two policies has the mean of their rewards and, KL being
    convex, at most the mean of their KLs. So are all points below the curve. Among noisy points the lucky ones make
    corners, which lifts every method by a part of its standard error: compare methods with equally many points.

    Args:
        points: {kl, gain, gain_se}, in any order.

    Returns:
        (kl, gain, gain_se) in order of KL, from the base model (0, 0, 0) to the largest KL.
    """
    path = [(0.0, 0.0, 0.0), *sorted((p["kl"], p["gain"], p["gain_se"]) for p in points)]
    best = max(path, key=lambda point: point[1])
    corners: list[tuple[float, float, float]] = []
    for point in [*(point for point in path if point[0] <= best[0]), (path[-1][0], *best[1:])]:
        while len(corners) > 1 and not above(corners[-2], corners[-1], point):
            corners.pop()
        corners.append(point)
    return corners


def above(left: tuple[float, ...], middle: tuple[float, ...], right: tuple[float, ...]) -> bool:
    """Whether the middle one of three points lies above the chord of the others."""
    return (middle[1] - left[1]) * (right[0] - left[0]) > (right[1] - left[1]) * (middle[0] - left[0])


def at_kl(points: Sequence[Mapping[str, float]], kl: float) -> Estimate | None:
    """A method's gain at a KL, on its own frontier (`hull`). Beyond its largest KL nothing is claimed.

    Args:
        points: {kl, gain, gain_se}, in any order.
        kl: nats, >= 0.

    Returns:
        The gain; its standard error interpolated likewise, which is too large rather than too small. None where no
        point has so much KL.
    """
    kls, gains, errors = np.array(hull(points)).T
    if kl > kls[-1]:
        return None
    return Estimate(float(np.interp(kl, kls, gains)), float(np.interp(kl, kls, errors)))


# --- seeds -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A mean over seeds; `half` is half its 95 % interval, None with a single seed."""

    mean: float
    half: float | None
    p: float | None = None
    """Of a difference: two-sided, by the same t distribution."""


def t_interval(values: Sequence[float]) -> Interval:
    """Mean and half the 95 % interval of Student's t, of independent values."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Interval(mean, None)
    variance = math.fsum((x - mean) ** 2 for x in values) / (n - 1)
    return Interval(mean, t_quantile(n - 1) * math.sqrt(variance / n))


def difference_interval(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Difference of two methods' means, with Welch's degrees of freedom; no interval where either has a single seed."""
    above, below = t_interval(values), t_interval(others)
    if above.half is None or below.half is None:
        return Interval(above.mean - below.mean, None)
    sizes = (len(values), len(others))
    squares = [(half / t_quantile(n - 1)) ** 2 for half, n in zip((above.half, below.half), sizes, strict=True)]
    total, difference = math.fsum(squares), above.mean - below.mean
    if total == 0:
        return Interval(difference, 0.0, float(difference == 0))
    freedom = total**2 / math.fsum(s**2 / (n - 1) for s, n in zip(squares, sizes, strict=True))
    return Interval(difference, t_quantile(freedom) * math.sqrt(total), p_value(difference, math.sqrt(total), freedom))


def paired_interval(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Mean difference of pairs; no interval of a single pair."""
    found = t_interval([value - other for value, other in zip(values, others, strict=True)])
    if found.half is None:
        return found
    freedom = len(values) - 1
    return Interval(found.mean, found.half, p_value(found.mean, found.half / t_quantile(freedom), freedom))


def ratio_interval(values: Sequence[float], others: Sequence[float]) -> Interval | None:
    """Ratio of two methods' means, by the delta method, with the degrees of freedom of the smaller group.

    None where the other mean is not positive.
    """
    above, below = t_interval(values), t_interval(others)
    if below.mean <= 0:
        return None
    ratio = above.mean / below.mean
    if above.half is None or below.half is None:
        return Interval(ratio, None)
    error = above.half / t_quantile(len(values) - 1)
    other = below.half / t_quantile(len(others) - 1)
    relative = math.hypot(error, ratio * other) / below.mean
    return Interval(ratio, t_quantile(min(len(values), len(others)) - 1) * relative)


def p_value(difference: float, error: float, freedom: float) -> float:
    """Two-sided p of a difference with a standard error, by Student's t."""
    from scipy.special import stdtr

    if error == 0:
        return float(difference == 0)
    return 2 * float(stdtr(freedom, -abs(difference) / error))


def t_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))
