"""What is measured on a policy, and the prompts it is measured on."""

import math

import pytest
import torch
from rl_fixtures import build_trainer, good_share, tiny_model, word_tokenizer

from saerl_cli.config.algo import AlgoConfig, AlgoKind
from saerl_cli.config.rlhf import PromptConfig
from saerl_cli.data.prompts import Prompt, as_prompts, build_prompts, cut_prompts, refuse_too_few
from saerl_cli.rewards.score import Part, Reward
from saerl_cli.rl.evaluation.measure import (
    Samples,
    Sampling,
    attribute_shares,
    describe,
    distinct,
    generate,
    heldout_loss,
    mean_and_error,
    measure,
    sequence_kl,
)
from saerl_cli.rl.policy import Policy, plain
from saerl_cli.sae.autoencoder import SAE
from saerl_cli.sae.describe import top_tokens

PROMPTS = [Prompt(f"w{i} w{i + 1}", (i + 2, i + 3)) for i in range(20)]


@pytest.fixture
def policy(tmp_path) -> Policy:
    """A policy some way from its reference."""
    trainer = build_trainer(tmp_path)
    for name, p in trainer.trainable():
        if "delta" in name:
            p.data.normal_(generator=torch.Generator().manual_seed(0))
    return plain(Policy(trainer.model.eval(), word_tokenizer(), [1, 7], 32))


def sampled(policy, seed=0, prompts=PROMPTS):
    return generate(policy.model, prompts, policy.tokenizer, [1, 7], 10, 1.0, batch_size=8, seed=seed)


def test_samples_are_a_function_of_the_seed_and_leave_the_random_state_alone(policy):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    first = sampled(policy)
    assert torch.equal(torch.rand(3), want)
    assert sampled(policy) == first != sampled(policy, seed=1)


def test_completions_end_with_their_first_end_token(policy):
    for ids in sampled(policy):
        assert 1 <= len(ids) <= 10 and not {1, 7} & set(ids[:-1])


@torch.no_grad()
def test_kl_against_a_plain_loop_over_tokens(policy):
    completions = sampled(policy)
    k1, exact = sequence_kl(policy, PROMPTS, completions, temperature=0.7, batch_size=8)
    alone = sequence_kl(policy, PROMPTS[3:4], completions[3:4], temperature=0.7, batch_size=1)
    assert alone[0][0] == pytest.approx(k1[3], abs=1e-4) and alone[1][0] == pytest.approx(exact[3], abs=1e-4)
    for prompt, ids, got_k1, got_exact in list(zip(PROMPTS, completions, k1, exact, strict=True))[:4]:
        want_k1 = want_exact = 0.0
        for t in range(len(ids)):
            context = torch.tensor([[*prompt.input_ids, *ids[:t]]])
            p = (policy.model(context).logits[0, -1] / 0.7).log_softmax(-1)
            with policy.reference() as reference:
                q = (reference(context).logits[0, -1] / 0.7).log_softmax(-1)
            want_k1 += float(p[ids[t]] - q[ids[t]])
            want_exact += float((p.exp() * (p - q)).sum())
        assert got_k1 == pytest.approx(want_k1, abs=1e-4) and got_exact == pytest.approx(want_exact, abs=1e-4)
    assert min(exact) >= 0 < max(exact)


def test_prompts_of_several_lengths_are_measured_as_if_alone(policy):
    prompts = [Prompt("a", (4,)), Prompt("b", (4, 5, 6, 8)), Prompt("c", (9, 3))]
    completions = [[5, 6, 1], [3, 3], [8, 4, 4, 4]]
    k1, exact = sequence_kl(policy, prompts, completions, temperature=1.0, batch_size=3)
    for i in range(3):
        one = sequence_kl(policy, prompts[i : i + 1], completions[i : i + 1], temperature=1.0, batch_size=1)
        assert (one[0][0], one[1][0]) == pytest.approx((k1[i], exact[i]), abs=1e-4)


def test_the_two_kl_estimates_agree_on_many_samples(policy):
    prompts = PROMPTS * 40
    k1, exact = sequence_kl(policy, prompts, sampled(policy, prompts=prompts), 1.0, 100)
    difference, error = mean_and_error([a - b for a, b in zip(k1, exact, strict=True)])
    assert abs(difference) < 4 * error, "k1 under the policy's samples is unbiased (false alarm: 6e-5)"


def test_an_untouched_policy_has_no_kl_at_all(tmp_path):
    policy = plain(Policy(build_trainer(tmp_path).model.eval(), word_tokenizer(), [1], 32))
    k1, exact = sequence_kl(policy, PROMPTS, sampled(policy), 1.0, 8)
    assert set(k1) == set(exact) == {0.0}


@torch.no_grad()
def test_heldout_loss_leaves_filling_out(tmp_path):
    model = tiny_model(tmp_path)
    rows = torch.tensor([[1, 4, 5, 1, 6, 7], [1, 8, 9, 1, 1, 1]])
    logp = model(rows).logits.log_softmax(-1)
    places = [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (1, 1), (1, 2), (1, 3)]  # not the separators that fill up
    want = -sum(float(logp[row, t - 1, rows[row, t]]) for row, t in places) / len(places)
    assert heldout_loss(model, rows) == pytest.approx(want, rel=1e-5)
    assert heldout_loss(model, rows, batch_size=1) == pytest.approx(want, rel=1e-5)


def test_measure_puts_both_models_side_by_side(policy):
    reward = Reward((Part("good", 2.0, lambda prompts, completions, ids: good_share(ids)),))
    rows = torch.tensor([[1, 4, 5, 1, 6, 7]])
    numbers, before, after = measure(policy, reward, PROMPTS, rows, Sampling(10, 1.0, 8, 3))
    assert numbers["reward_after"] == pytest.approx(2 * numbers["parts_after"]["good"])
    assert numbers["reward_before"] == pytest.approx(sum(before.scores["reward"]) / 20)
    assert numbers["kl"] == pytest.approx(sum(after.kl) / 20) and before.kl == []
    assert numbers["nll_heldout_before"] != numbers["nll_heldout_after"]
    again = measure(policy, reward, PROMPTS, rows, Sampling(10, 1.0, 8, 3))[0]
    assert again == numbers


def test_standard_error_and_distinct_by_hand():
    mean, error = mean_and_error([1.0, 2.0, 3.0, 6.0])
    assert (mean, error) == (3, pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3 / 4)))
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4 and distinct([[1, 1, 2]], 1) == 2 / 3
    assert distinct([[5]], 2) == 0


def test_attributes_are_counted_in_the_completion_only():
    prompts = [Prompt("this damn film was", (1,)), Prompt("we saw", (1,))]
    samples = Samples(prompts, [[2] * 4, [2] * 3], ["bloody awful, damn", "a film."], {"reward": [0.0, 0.0]})
    found = attribute_shares(samples)["cursing"]
    assert found == {"per_completion": 1.0, "share": 2 / 7}
    assert describe(samples, [2])["ended"] == 1 and describe(samples, [3])["length"] == 3.5


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_are_distinct_beginnings_of_long_enough_documents():
    encode = word_tokenizer().encode
    texts = ["w1 w2 w3", "w1 w2 w4 w5", "w1 w2", "w3 w4 w5"]
    assert cut_prompts(texts, encode, 2) == [(3, 4), (5, 6)], "the third has nothing to continue"
    assert cut_prompts(texts, encode, 2, count=1) == [(3, 4)]
    assert cut_prompts(texts, encode, 2, avoid=[(3, 4)]) == [(5, 6)]


def test_heldout_prompts_are_not_training_prompts():
    train, heldout = build_prompts(["w1 w2 w3", "w4 w5 w6"], ["w1 w2 w9", "w7 w8 w9"], word_tokenizer(), 2, None)
    assert [p.text for p in train] == ["w1 w2", "w4 w5"] and [p.text for p in heldout] == ["w7 w8"]
    assert heldout[0].input_ids == (9, 10)
    with pytest.raises(ValueError, match="no held-out document has more than prompts.tokens=5"):
        build_prompts(["w1 w2 w3 w4 w5 w6"], ["w1 w2"], word_tokenizer(), 5, None)


def test_a_bos_token_comes_on_top_where_the_tokenizer_adds_one(shared_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "neox_stories_nano")
    ids = tokenizer("Once upon a time there", add_special_tokens=False)["input_ids"][:4]
    (prompt,) = as_prompts([tuple(ids)], tokenizer)
    assert prompt.input_ids == (tokenizer.bos_token_id, *ids)
    assert "<s>" not in prompt.text


SIX_TOKENS = PromptConfig(tokens=6)


def test_too_few_prompts_name_both_numbers():
    refuse_too_few(16, AlgoConfig(rollouts=16), SIX_TOKENS)
    with pytest.raises(ValueError, match="give 9 distinct prompts of 6 tokens, but one phase takes algo.rollouts=16"):
        refuse_too_few(9, AlgoConfig(rollouts=16), SIX_TOKENS)
    grouped = AlgoConfig(kind=AlgoKind.grpo, rollouts=64, group=8)
    refuse_too_few(8, grouped, SIX_TOKENS)
    with pytest.raises(ValueError, match="one phase takes algo.rollouts=64 / algo.group=8; lower"):
        refuse_too_few(7, grouped, SIX_TOKENS)
    with pytest.raises(ValueError, match="no document has more than prompts.tokens=6 tokens; lower it"):
        refuse_too_few(0, AlgoConfig(kind=AlgoKind.dpo), SIX_TOKENS)


# --- labels ----------------------------------------------------------------------------------------------------------


def test_top_tokens_by_summed_activation():
    sae = SAE(2, 3)
    sae.W_enc.data.copy_(torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, -1.0]]))
    x = torch.tensor([[1.0, 0.0], [0.6, 2.0], [0.6, 0.0], [0.0, 1.0]])
    tokens = torch.tensor([7, 9, 9, 4])
    assert top_tokens(sae.encode(x), tokens, 2) == [[9, 7], [9, 4], []], "1.2 against 1.0; 2.0 against 1.0; silent"
    assert top_tokens(sae.encode(x)[:, [1]], tokens, 1) == [[9]]
