"""The mathematics of the reward-KL frontier against cases whose answer is known."""

import itertools
import math

import numpy as np
import pytest

from saerl_cli.analysis.frontier import (
    MIN_ESS,
    at_kl,
    best_of_n,
    difference_interval,
    efficiency,
    hull,
    kl_optimum,
    paired_interval,
    pooled_optimum,
    ratio_interval,
    t_interval,
    tilted,
)


def gaussian(prompts: int, samples: int, spread: float = 0.0, seed: int = 0) -> np.ndarray:
    """Standard normal rewards around a mean of each prompt; the limit of the first is sqrt(2 KL)."""
    random = np.random.default_rng(seed)
    return random.normal(size=(prompts, samples)) + spread * random.normal(size=(prompts, 1))


# --- tilting ---------------------------------------------------------------------------------------------------------


def test_two_samples_by_hand():
    found = tilted(np.array([[0.0, math.log(3)]]), beta=1.0)  # weights 1 and 3
    reward = 0.75 * math.log(3)
    assert found.reward[0] == pytest.approx(reward)
    assert found.kl[0] == pytest.approx(reward - math.log(2))  # E[w] = 2
    assert found.kl[0] == pytest.approx(0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5))
    assert found.ess[0] == pytest.approx(16 / 10)
    assert found.log_z[0] == pytest.approx(2 * math.log(2) - math.log(3) / 2)  # jackknife: without one, log 3 and log 1


def test_weights_that_overflow_are_harmless():
    rewards = np.array([[1e4, 0.0, -1e4], [-5e5, -5e5, -5e5]])
    found = tilted(rewards, beta=1e-2)
    assert found.reward == pytest.approx([1e4, -5e5]) and found.ess == pytest.approx([1, 3])
    assert found.kl == pytest.approx([math.log(3), 0]) and np.isfinite(found.log_z).all()


def test_the_jackknife_is_the_textbook_one():
    rewards = np.random.default_rng(1).normal(size=7)

    def log_z(r):
        return math.log(np.mean(np.exp(r / 0.4)))

    without = [log_z(np.delete(rewards, j)) for j in range(7)]
    want = 7 * log_z(rewards) - 6 * np.mean(without)
    assert tilted(rewards[None], 0.4).log_z[0] == pytest.approx(want)


# --- the limit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", [0.1, 0.5, 1.0, 2.0])
def test_gaussian_rewards_gain_the_root_of_twice_the_kl(kl):
    point = kl_optimum(gaussian(3000, 64)).at(kl)
    assert point.reliable and point.gain == pytest.approx(math.sqrt(2 * kl), rel=0.02)
    assert point.beta == pytest.approx(1 / math.sqrt(2 * kl), rel=0.15)  # the slope


def test_poisson_counts_that_are_punished():
    """r = -N, N ~ Poisson(2): tilting makes it Poisson(m), m = 2 exp(-1/beta); KL = m log(m/2) - m + 2."""
    counts = np.random.default_rng(0).poisson(2.0, size=(3000, 64))
    limit = kl_optimum(-counts.astype(float))
    for m in (1.5, 1.0, 0.5):
        point = limit.at(m * math.log(m / 2) - m + 2)
        assert point.reliable and point.gain == pytest.approx(2 - m, rel=0.015)
    assert limit.at(6).gain == pytest.approx(2, rel=0.05), "no count is below 0"


def test_few_samples_make_the_limit_too_low_and_are_called_unreliable():
    few, many = kl_optimum(gaussian(3000, 8)), kl_optimum(gaussian(3000, 128))
    assert few.at(0.25).reliable and not few.at(2.0).reliable and many.at(2.0).reliable
    assert few.at(2.0).gain < 1.9 < many.at(2.0).gain
    last = [few.at(kl) for kl in np.linspace(0.05, 2, 60) if few.at(kl).reliable][-1]
    assert last.ess == pytest.approx(MIN_ESS, rel=0.2) and last.gain == pytest.approx(math.sqrt(2 * last.kl), rel=0.05)


def test_the_dual_and_the_formulas_of_the_tilted_policy_agree():
    rewards = gaussian(400, 256, seed=3)
    limit = kl_optimum(rewards)
    for beta in (2.0, 1.0, 0.7):
        found = tilted(rewards, beta)
        gain = found.reward.mean() - rewards.mean()
        assert limit.at(found.kl.mean()).gain == pytest.approx(gain, rel=0.02)


def test_one_temperature_for_all_prompts_spends_the_kl_where_it_pays():
    """Prompts with standard deviations s gain s^2 / beta each at a mean KL of E[s^2] / (2 beta^2)."""
    scales = np.array([0.5, 2.0]).repeat(1500)[:, None]
    point = kl_optimum(scales * gaussian(3000, 128)).at(0.4)
    assert point.gain == pytest.approx(math.sqrt(2 * 0.4 * (scales**2).mean()), rel=0.02)


def test_pooling_may_choose_prompts_and_reaches_further():
    """Means of prompts with variance 3 around rewards with variance 1: the pooled reward has standard deviation 2."""
    rewards = gaussian(3000, 16, spread=math.sqrt(3))
    assert kl_optimum(rewards).at(0.5).gain == pytest.approx(1, rel=0.02)
    pooled = pooled_optimum(rewards)
    assert pooled.at(0.5).gain == pytest.approx(2, rel=0.05)
    alike = gaussian(3000, 16)
    far = pooled_optimum(alike).at(3.0)
    assert far.reliable and far.gain == pytest.approx(math.sqrt(6), rel=0.05) and not kl_optimum(alike).at(3.0).reliable


@pytest.mark.parametrize(("optimum", "spread"), [(kl_optimum, 0.0), (kl_optimum, 1.5), (pooled_optimum, 0.7)])
def test_standard_errors_are_those_of_repeated_draws(optimum, spread):
    points = [optimum(gaussian(60, 24, spread, seed)).at(0.4) for seed in range(150)]
    seen = np.std([point.gain for point in points], ddof=1)
    assert np.mean([point.gain_se for point in points]) == pytest.approx(seen, rel=0.25)


def test_limits_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="nothing to gain"):
        kl_optimum(np.repeat(gaussian(5, 1), 4, axis=1))
    with pytest.raises(ValueError, match="at least 2 base samples"):
        kl_optimum(gaussian(5, 1))


# --- best-of-n -------------------------------------------------------------------------------------------------------


def test_best_of_n_is_the_mean_over_all_subsets():
    rewards = np.random.default_rng(2).normal(size=(3, 5)).round(1)
    points = best_of_n(rewards)
    assert [point["n"] for point in points] == [1, 2, 4]
    for point in points:
        n = int(point["n"])
        best = [np.mean([max(subset) for subset in itertools.combinations(row, n)]) for row in rewards]
        gains = np.array(best) - rewards.mean(1)
        assert point["gain"] == pytest.approx(gains.mean(), abs=1e-12)
        assert point["gain_se"] == pytest.approx(gains.std(ddof=1) / math.sqrt(3))
    assert points[0]["kl"] == 0 and points[1]["kl"] == pytest.approx(math.log(2) - 0.5)


def test_best_of_n_stays_below_the_limit():
    rewards = gaussian(2000, 64)
    limit = kl_optimum(rewards)
    for point in best_of_n(rewards)[1:5]:
        best = limit.at(point["kl"])
        assert best.reliable and 0.9 * best.gain < point["gain"] < best.gain


# --- methods ---------------------------------------------------------------------------------------------------------


def test_efficiency_and_its_error_by_hand():
    limit = kl_optimum(gaussian(3000, 64))
    best = limit.at(0.5)  # gain 1, slope 1
    found = efficiency(0.5, 0.03, 0.5, 0.04, limit)
    assert found is not None and found.value == pytest.approx(0.5, rel=0.02)
    want = math.sqrt(0.03**2 + (0.5 * best.beta * 0.04) ** 2 + (0.5 * best.gain_se) ** 2)
    assert found.se == pytest.approx(want, rel=0.05)
    assert efficiency(1.0, 0.1, 5.0, 0.1, limit) is None, "64 samples do not show 5 nats"
    assert efficiency(0.0, 0.1, 0.0, 0.1, limit) is None


def test_at_kl_is_linear_through_the_base_model_and_never_extrapolates():
    points = [{"kl": 2.0, "gain": 3.0, "gain_se": 0.3}, {"kl": 1.0, "gain": 2.0, "gain_se": 0.1}]
    for kl, value, error in ((0.0, 0.0, 0.0), (0.5, 1.0, 0.05), (1.0, 2.0, 0.1), (1.5, 2.5, 0.2), (2.0, 3.0, 0.3)):
        found = at_kl(points, kl)
        assert found is not None and (found.value, found.se) == pytest.approx((value, error))
    assert at_kl(points, 2.0001) is None


def test_a_method_is_measured_on_its_own_frontier_by_hand():
    """Points under a chord of others count for nothing; a KL that brings no more gain is not held against a method."""
    given = [(0.5, 0.4, 0.1), (1.0, 2.0, 0.2), (1.5, 1.0, 0.3), (2.0, 2.5, 0.4), (3.0, 2.2, 0.5)]
    points = [dict(zip(("kl", "gain", "gain_se"), point, strict=True)) for point in given]
    assert hull(points) == [(0, 0, 0), (1.0, 2.0, 0.2), (2.0, 2.5, 0.4), (3.0, 2.5, 0.4)]
    for kl, value in ((0.5, 1.0), (1.5, 2.25), (2.5, 2.5), (3.0, 2.5)):
        found = at_kl(points, kl)
        assert found is not None and found.value == pytest.approx(value)
    assert at_kl(points, 3.1) is None
    losing = hull([{"kl": 1.0, "gain": -1.0, "gain_se": 0.1}])
    assert losing == [(0, 0, 0), (1.0, 0, 0)], "the base model is on every frontier"


def test_intervals_over_seeds():
    found = t_interval([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.half == pytest.approx(4.302653 / math.sqrt(3))
    assert t_interval([5.0]).half is None
    ratio = ratio_interval([1.0, 2.0, 3.0], [4.0, 4.0, 4.0])
    assert ratio is not None and ratio.mean == 0.5 and ratio.half == pytest.approx(4.302653 / math.sqrt(3) / 4)
    assert ratio_interval([1.0], [-1.0]) is None


def test_differences_have_the_interval_of_welch():
    from scipy.stats import ttest_ind, ttest_rel

    values, others = [1.0, 2.5, 3.0, 2.0], [0.1, 0.4, 0.2]
    found = difference_interval(values, others)
    want = ttest_ind(values, others, equal_var=False).confidence_interval(0.95)
    assert found.half is not None
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((want.low, want.high))
    assert found.p == pytest.approx(ttest_ind(values, others, equal_var=False).pvalue)
    paired, want = paired_interval(values[:3], others), ttest_rel(values[:3], others)
    assert paired.p == pytest.approx(want.pvalue)
    assert paired.half == pytest.approx(np.ptp(want.confidence_interval(0.95)) / 2)
    assert difference_interval([1.0], [2.0, 3.0]).half is None and difference_interval([1.0] * 3, [2.0] * 3).half == 0
