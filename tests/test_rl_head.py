"""The frozen head gives TRL's numbers and gradients; where it may not, TRL's runs."""

import pytest
import torch
from adapter_fixtures import VOCABULARY, coefficients_on, tiny_llama, tiny_neox
from trl.trainer.utils import add_fused_lm_head

from saerl_cli.rl.rollouts import scoring
from saerl_cli.rl.rollouts.scoring import FrozenHead, add_scoring_head


def batch():
    ids = torch.randint(2, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[2, 6:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "fused_lm_head": True}


def scored(policy):
    policy.zero_grad()
    out = policy(**batch())
    (out.log_probs * torch.linspace(-1, 2, 8)).sum().backward()
    return out, [p.grad for p in policy.parameters() if p.grad is not None]


@pytest.mark.parametrize("make", [tiny_neox, tiny_llama])
@pytest.mark.parametrize(("temperature", "autocast"), [(1.0, False), (0.7, False), (1.0, True)])
def test_it_is_trl_s_head(tmp_path, monkeypatch, make, temperature, autocast):
    monkeypatch.setattr(scoring, "LOGITS_HELD", 1)  # tiles of 16 of the 22 tokens
    base = make().requires_grad_(False)
    add_fused_lm_head(base, temperature, outputs=("log_probs", "entropy"))
    policy = coefficients_on(base, tmp_path, seed=3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want, gradients = scored(policy)
        add_scoring_head(base, temperature)
        got, ours = scored(policy)
    assert "FrozenHead" in str(got.log_probs.grad_fn.next_functions), "it is ours that ran"
    close = {"atol": 0.2, "rtol": 0.05} if autocast else {"atol": 2e-5, "rtol": 1e-4}
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), **close)
    assert torch.equal(got.label_mask, want.label_mask) and not got.entropy.requires_grad
    assert len(ours) == len(gradients) == 1
    torch.testing.assert_close(ours[0], gradients[0], **({"atol": 0.5, "rtol": 0.1} if autocast else close))


def test_gradients_are_finite_differences():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=generator, dtype=torch.float32) for n in (6, 7))
    labels = torch.tensor([0, 1, 2, 6, 5, 3])
    hidden.requires_grad_()
    logps, entropies = FrozenHead.apply(hidden, weight, None, labels, 0.5)
    z = (hidden @ weight.T / 0.5).log_softmax(-1)
    torch.testing.assert_close(logps, z[range(6), labels])
    torch.testing.assert_close(entropies, -(z.exp() * z).sum(-1))
    weights = torch.arange(6.0)
    (want,) = torch.autograd.grad((z[range(6), labels] * weights).sum(), hidden)
    torch.testing.assert_close(torch.autograd.grad((logps * weights).sum(), hidden)[0], want)


def test_a_head_that_is_trained_keeps_trl_s():
    base = tiny_neox().requires_grad_(True)
    add_fused_lm_head(base, outputs=("log_probs", "entropy"))
    add_scoring_head(base, 1.0)
    base(**batch()).log_probs.sum().backward()
    assert base.lm_head.weight.grad.abs().sum() > 0


def test_without_the_flag_the_model_is_itself():
    base = tiny_neox().requires_grad_(False)
    ids = batch()["input_ids"]
    want = base(input_ids=ids, labels=ids)
    add_fused_lm_head(base)
    add_scoring_head(base, 1.0)
    got = base(input_ids=ids, labels=ids)
    assert torch.equal(got.logits, want.logits) and torch.equal(got.loss, want.loss)
