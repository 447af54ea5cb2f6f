"""PPO's mathematics against values worked out by hand and against slow python loops."""

import math

import pytest
import torch

from saerl_cli.rl.training import advantages, losses

MASK = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])


def test_score_lands_on_last_kept_token_and_kl_is_charged_everywhere():
    logp = torch.tensor([[-1.0, -2.0, -3.0, -9.0], [-1.0, -9.0, -9.0, -9.0], [-1.0, -1.0, -1.0, -1.0]])
    logp_ref = torch.tensor([[-1.5, -2.0, -2.0, 7.0], [-3.0, 7.0, 7.0, 7.0], [-1.0, -1.0, -1.0, -2.0]])
    rewards = advantages.token_rewards(torch.tensor([10.0, 20.0, -3.0]), logp, logp_ref, MASK, kl_coef=0.1)
    want = [[-0.05, 0.0, 10.1, 0.0], [20.0 - 0.2, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -3.1]]
    torch.testing.assert_close(rewards, torch.tensor(want))


def test_completion_without_tokens_gets_no_score():
    zeros = torch.zeros(1, 3)
    assert advantages.token_rewards(torch.tensor([5.0]), zeros, zeros, zeros, 0.1).abs().sum() == 0


def test_gae_by_hand():
    rewards = torch.tensor([[0.0, 1.0, 5.0]])
    values = torch.tensor([[0.5, 0.25, 9.0]])  # the last one lies after the end
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    found, returns = advantages.gae(rewards, values, mask, gamma=1.0, lam=0.5)
    # A_1 = 1 - 0.25 = 0.75;  A_0 = 0 + 0.25 - 0.5 + 0.5 * 0.75 = 0.125
    torch.testing.assert_close(found, torch.tensor([[0.125, 0.75, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.625, 1.0, 0.0]]))


def gae_in_loops(rewards, values, mask, gamma, lam):
    out = [[0.0] * len(row) for row in rewards]
    for b, row in enumerate(rewards):
        length = int(sum(mask[b]))
        for t in range(length):
            for later in range(t, length):
                following = values[b][later + 1] if later + 1 < length else 0.0
                error = row[later] + gamma * following - values[b][later]
                out[b][t] += (gamma * lam) ** (later - t) * error
    return out


@pytest.mark.parametrize("seed", range(3))
def test_gae_against_the_sum_it_stands_for(seed):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, 8, (5,), generator=generator)
    mask = (torch.arange(7) < lengths[:, None]).double()
    found, returns = advantages.gae(rewards, values, mask, gamma=0.9, lam=0.8)
    want = torch.tensor(gae_in_loops(rewards.tolist(), values.tolist(), mask.tolist(), 0.9, 0.8), dtype=torch.float64)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(returns, want + values * mask)


def test_lambda_one_gives_reward_to_go():
    rewards, values = torch.randn(2, 3, 4)
    _, returns = advantages.gae(rewards * MASK, values, MASK, gamma=1.0, lam=1.0)
    to_go = (rewards * MASK).flip(1).cumsum(1).flip(1) * MASK
    torch.testing.assert_close(returns, to_go)


def test_whitening_counts_kept_tokens_only():
    x = torch.tensor([[1.0, 3.0, 1000.0]])
    white = advantages.whiten(x, torch.tensor([[1.0, 1.0, 0.0]]))
    torch.testing.assert_close(white, torch.tensor([[-1.0, 1.0, 0.0]]))


def test_whitening_of_two_processes_equals_that_of_one():
    x, mask = torch.randn(4, 6), (torch.rand(4, 6) > 0.3).float()
    stats = []
    for half in (slice(0, 2), slice(2, 4)):
        advantages.whiten(x[half], mask[half], reduce=lambda t: stats.append(t) or t)
    total = stats[0] + stats[1]
    parts = [advantages.whiten(x[half], mask[half], lambda _: total) for half in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(torch.cat(parts), advantages.whiten(x, mask))


def test_whitening_survives_a_constant():
    assert advantages.whiten(torch.full((2, 2), 3.0), torch.ones(2, 2)).abs().max() == 0


def test_surrogate_by_hand():
    old = torch.zeros(1, 4)
    logp = torch.tensor([1.5, 1.5, 0.5, 0.5]).log()[None]
    better = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    loss = losses.clipped_surrogate(logp, old, better, cliprange=0.2)
    torch.testing.assert_close(loss, torch.tensor([[-1.2, 1.5, -0.5, 0.8]]))


def test_value_loss_by_hand():
    old, returns = torch.zeros(1, 3), torch.tensor([[1.0, 1.0, -1.0]])
    values = torch.tensor([[0.1, 0.9, 0.9]])
    # 0.9 is held at 0.2: errors 0.81 | 0.64 (held) | 3.61 (free)
    want = torch.tensor([[0.81, 0.64, 3.61]]) / 2
    torch.testing.assert_close(losses.clipped_value_loss(values, old, returns, 0.2), want)


def test_kl_estimates():
    logp, logp_ref = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -1.5]])
    mask = torch.tensor([[1.0, 1.0]])
    assert advantages.k1(logp, logp_ref, mask).item() == pytest.approx(0.5)
    want = (math.exp(-1) - 1 + 1) + (math.exp(0.5) - 1 - 0.5)
    assert advantages.k3(logp, logp_ref, mask).item() == pytest.approx(want)
    assert advantages.k3(logp, logp_ref, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(math.exp(-1))
    assert advantages.k1(logp, logp, mask).item() == 0


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert advantages.explained_variance(returns, returns, mask) == pytest.approx(1)
    assert advantages.explained_variance(torch.zeros(1, 4), returns, mask) == pytest.approx(0)
    assert advantages.explained_variance(returns, torch.ones(1, 4), mask) == 0


def test_groups_by_hand():
    scores = torch.tensor([1.0, 3.0, 5.0, 5.0])
    torch.testing.assert_close(advantages.group_advantages(scores, 2, scale=False), torch.tensor([-1.0, 1.0, 0.0, 0.0]))
    scaled = advantages.group_advantages(scores, 2, scale=True)
    torch.testing.assert_close(scaled, torch.tensor([-1.0, 1.0, 0.0, 0.0]) / (math.sqrt(2) + 1e-4))
    torch.testing.assert_close(
        advantages.leave_one_out(torch.tensor([1.0, 2.0, 6.0]), 3), torch.tensor([-3.0, -1.5, 4.5])
    )


def test_the_kl_of_a_token_by_hand():
    got = losses.token_k3(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -1.5]]))
    torch.testing.assert_close(got, torch.tensor([[math.exp(-1) - 1 + 1, math.exp(0.5) - 1 - 0.5]]))
