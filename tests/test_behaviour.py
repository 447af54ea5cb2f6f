"""Tricks a policy may have learned, on completions and rewards small enough to count by hand."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from rl_fixtures import build_trainer, good_share, word_tokenizer

from saerl_cli.data.prompts import Prompt
from saerl_cli.rewards.score import Part, Reward
from saerl_cli.rl.evaluation.baselines import Constant, baselines, behaviour, price
from saerl_cli.rl.evaluation.behaviour import (
    BEATEN,
    REWARD_ALONE,
    beaten,
    composition,
    excess_kurtosis,
    hill,
    near,
    one_token,
    repetition,
    tail,
    top_share,
    top_token,
    warnings_of,
)
from saerl_cli.rl.evaluation.measure import Sampling, draw, sequence_kl
from saerl_cli.rl.policy import Policy, plain


def test_repetition_counts_bigrams_seen_before_in_the_same_completion():
    assert repetition([[1, 2, 3, 4]]) == 0
    assert repetition([[5, 5, 5, 5]]) == pytest.approx(2 / 3)  # 3 bigrams, one distinct
    assert repetition([[1, 2, 1, 2, 1], [1, 2, 3]]) == pytest.approx((2 / 4 + 0) / 2)
    assert repetition([[1], []]) == 0  # too short to repeat anything


def test_top_token():
    assert top_token([[1, 2, 2], [2, 3]]) == (2, 3 / 5)
    assert top_token([[], []]) is None


def test_kurtosis_of_known_distributions():
    assert excess_kurtosis([0, 1]) == pytest.approx(-2)  # a fair coin
    assert excess_kurtosis([0] * 9 + [1]) == pytest.approx(1 / (0.1 * 0.9) - 6)  # Bernoulli(p): 1 / (p q) - 6
    assert excess_kurtosis([3.0, 3.0]) is None


@pytest.mark.parametrize("alpha", [0.8, 1.5, 3.0])
def test_hill_finds_the_index_of_a_pareto(alpha):
    n = 10_000
    quantiles = [(1 - (i + 0.5) / n) ** (-1 / alpha) for i in range(n)]  # without random numbers
    found, error = hill([*quantiles, *(-x for x in quantiles)], share=0.05)  # median 0
    assert error == pytest.approx(found / math.sqrt(1000))
    assert found == pytest.approx(alpha, rel=0.01)


def test_hill_by_hand_and_where_there_is_no_tail():
    values = [0.0] * 50 + [1.0] * 45 + [2.0] * 5  # median 0.5: x_0 = 0.5, the five largest are 1.5
    found, error = hill(values, share=0.05)
    assert found == pytest.approx(1 / math.log(3)) and error == pytest.approx(found / math.sqrt(5))
    assert hill([1.0] * 100) is None
    assert hill([0.0] * 90 + [1.0] * 10, share=0.1) is None  # the next value is no larger than the median
    assert hill(list(range(20)), share=0.1) is None  # two values are no tail


def test_share_of_the_largest_reward():
    assert top_share([0, 0, 0, 1, 3]) == pytest.approx(3 / 4)
    assert top_share([1, 1, 1]) is None
    assert tail([1.0, 1.0]) == {"kurtosis": None, "hill": None, "hill_se": None, "top_share": None}


def test_composition_splits_a_gain_as_kitagawa_does():
    before, after = [[7], [8], [8], [8]], [[7], [7], [7], [8]]
    r_before, r_after = np.array([2.0, 0.0, 1.0, 2.0]), np.array([2.0, 3.0, 4.0, 0.0])
    # strata of token 7: held by 1/4 then 3/4 (means 2 and 3); not held by 3/4 then 1/4 (means 1 and 0)
    want = (3 / 4 - 1 / 4) * (2 + 3) / 2 + (1 / 4 - 3 / 4) * (1 + 0) / 2
    assert composition(before, after, r_before, r_after, [7])[0] == pytest.approx(want)
    # a token that is never written explains nothing
    assert composition(before, after, r_before, r_after, [9])[0] == pytest.approx(0)


def counted(rows, token):
    return [float(Counter(row)[token]) for row in rows]


def test_a_gain_that_is_one_token_is_found_and_one_that_is_not_is_not():
    rng = np.random.default_rng(0)
    before = [rng.integers(0, 6, 8).tolist() for _ in range(200)]
    after = [[*row[:-1], 3] for row in before]  # the policy writes token 3 at the end
    found = one_token(before, after, counted(before, 3), counted(after, 3))
    assert found["token"] == 3 and found["share"] > 0.8 and found["held_after"] == 1
    assert found["gain_without"] is None  # no completion is without it
    better = [x + 1 for x in counted(before, 3)]  # the same completions, all worth one more
    assert abs(one_token(before, before, counted(before, 3), better)["share"]) < 0.05
    assert one_token(before, before, counted(before, 3), counted(before, 3)) is None  # nothing gained


def test_a_punished_token_explains_a_gain_too():
    before = [[1, 9] if i % 4 < 3 else [1, 2] for i in range(80)]
    after = [[1, 2]] * 80
    found = one_token(before, after, [-x for x in counted(before, 9)], [0.0] * 80)
    assert found["token"] in (9, 2)  # one goes, the other comes
    assert found["share"] == pytest.approx(1) and found["gain"] == pytest.approx(found["explained"])


def test_near_is_an_overlap_of_multisets():
    rows = [[5, 5, 5, 5, 5], [5, 5, 5, 5, 6], [5, 6, 7, 8, 9], []]
    assert near(rows, [5, 5, 5, 5, 5]) == 2 / 4  # 4 of 5 alike is the least that counts


# --- constants -------------------------------------------------------------------------------------------------------

PROMPTS = [Prompt(f"w{i} w{i + 1}", (i + 2, i + 3)) for i in range(20)]
HOW = Sampling(max_new_tokens=6, temperature=0.8, batch_size=8, seed=0)


@pytest.fixture
def policy(tmp_path) -> Policy:
    trainer = build_trainer(tmp_path)
    for name, p in trainer.trainable():
        if "delta" in name:
            p.data.normal_(generator=torch.Generator().manual_seed(0))
    return plain(Policy(trainer.model.eval(), word_tokenizer(), [1], 32))


def measured(policy, function):
    reward = Reward((Part("part", 1.0, function),))
    before, after = (draw(policy, reward, PROMPTS, HOW, reference=ref) for ref in (True, False))
    return reward, before, after


def rewards_w5(prompts, completions, completion_ids):
    """Share of the token w5, whose id is 7."""
    return [sum(token == 7 for token in ids) / len(ids) for ids in completion_ids]


def test_the_rewarded_token_is_the_best_constant(policy):
    reward, before, after = measured(policy, rewards_w5)
    found = behaviour(policy, reward, before, after, HOW, kl_coef=0.1)
    best, own = found["baselines"]["string"], found["baselines"]["policy"]
    assert found["baselines"]["token"]["token"] == "w5" and best["reward"] == 1
    assert best["difference"] == pytest.approx(1 - own["reward"])
    assert best["objective"] == pytest.approx(1 - 0.1 * best["kl"])
    graded = [x for p, x in zip(after.prompts, after.scores["reward"], strict=True) if p in PROMPTS[1::2]]
    assert own["reward"] == pytest.approx(sum(graded) / 10)  # on the prompts it was not chosen on
    assert "'w5' again and again for every prompt has reward 1.000" in warnings_of({"behaviour": found})[0]


@pytest.mark.parametrize("kl_coef", [None, 0.0, 10.0])
def test_the_verdict_is_taken_on_what_was_optimised(policy, kl_coef):
    reward, before, after = measured(policy, rewards_w5)
    found = behaviour(policy, reward, before, after, HOW, kl_coef)
    constants = [found["baselines"][name] for name in ("string", "best", "token", "empty")]
    if not kl_coef:  # the rewarded token
        assert found["beaten"] and found["baselines"]["best"] == found["baselines"]["string"]
        assert warnings_of({"behaviour": found})[0].startswith(BEATEN)
    else:  # any text costs more KL than the policy spends, and the cheapest one is the best of them
        assert found["baselines"]["best"]["objective"] == max(c["objective"] for c in constants)
        assert not found["beaten"] and warnings_of({"behaviour": found})[0].startswith(REWARD_ALONE)


def test_the_verdict_on_numbers_of_an_earlier_version():
    string = {"kind": "empty", "reward": 0.0, "difference": 0.08, "kl": 12.9, "near": 0.0}
    old = {"beaten": True, "baselines": {"string": string, "policy": {"reward": -0.08, "kl": 2.41}}}
    assert beaten(old) and warnings_of({"behaviour": old})[0].startswith(BEATEN)  # no KL weight is known
    string["objective"], old["baselines"]["kl_coef"] = -0.647, 0.05
    old["baselines"]["policy"]["objective"] = -0.199
    assert not beaten(old)
    assert warnings_of({"behaviour": old}) == [
        "a constant wins by reward alone: the empty completion for every prompt has reward 0.000 (policy: -0.080) at a"
        " KL of 12.9 nats (2.41), less beta KL -0.647 (-0.199; beta 0.05); 0% of the policy's completions are nearly"
        " that"
    ]
    assert beaten({"beaten": True}) and not beaten({})


def test_a_policy_that_leaves_the_language_is_told():
    def numbers(before, after):
        shares = {"before": before, "after": after}
        return {f"attributes_{when}": {"second_language": {"share": share}} for when, share in shares.items()}

    assert warnings_of(numbers(0.066, 0.145)) == [
        "the policy leaves the language: 14% of its words are in the second one, which has no curse words (untouched"
        " model: 7%)"
    ]
    assert warnings_of(numbers(0.066, 0.08)) == [] and warnings_of(numbers(0.12, 0.16)) == []


def test_a_constant_that_only_some_prompts_reward_does_not_beat_a_policy_that_reads_them(policy):
    def first_token_again(prompts, completions, completion_ids):
        return [
            float(text.split()[:1] == prompt.split()[:1]) for prompt, text in zip(prompts, completions, strict=True)
        ]

    reward, before, after = measured(policy, first_token_again)
    answers = [Constant("string", p.input_ids[:1] + (1,), p.text.split()[0]) for p in after.prompts]
    after.completion_ids = [list(a.ids) for a in answers]
    after.texts, after.scores = [a.text for a in answers], {"part": [1.0] * 20, "reward": [1.0] * 20}
    found = baselines(policy, reward, before, after, HOW, None)
    assert found["string"]["reward"] <= 1 / 10 and found["string"]["difference"] < 0
    assert found["string"]["objective"] is None
    assert warnings_of({"behaviour": {"baselines": found}}) == []


@torch.no_grad()
def test_the_price_of_a_constant_is_the_kl_of_always_writing_it(policy):
    constant = Constant("string", (4, 9, 1), "w2 w7")
    got = price(policy, constant, PROMPTS[:3], HOW)
    for prompt, value in zip(PROMPTS[:3], got, strict=True):
        want = 0.0
        for t, token in enumerate(constant.ids):
            with policy.reference() as reference:
                logits = reference(torch.tensor([[*prompt.input_ids, *constant.ids[:t]]])).logits[0, -1]
            want -= float((logits / 0.8).log_softmax(-1)[token])
        assert value == pytest.approx(want, abs=1e-4)
    # and a policy that writes it with probability 1 has log pi = 0: k1 = -log p_ref
    k1, _ = sequence_kl(policy, PROMPTS[:3], [list(constant.ids)] * 3, 0.8, 8)
    assert all(price_ >= k for price_, k in zip(got, k1, strict=True))


def test_a_reward_of_a_single_prompt_and_samples_that_are_all_empty_are_described(policy):
    reward = Reward((Part("part", 1.0, lambda p, c, ids: [0.0] * len(p)),))
    before, after = (draw(policy, reward, PROMPTS[:1] * 4, HOW, reference=ref) for ref in (True, False))
    after.completion_ids, after.texts = [[1]] * 4, [""] * 4
    found = behaviour(policy, reward, before, after, HOW)
    assert found["after"]["commonest"] == 1 and found["baselines"]["empty"]["near"] == 1
    assert found["one_token"] is None and found["baselines"]["kl_coef"] is None


def test_warnings_from_numbers_of_an_earlier_version():
    numbers = {"length_before": 20.0, "length_after": 5.0, "distinct_2_before": 0.5, "distinct_2_after": 0.45}
    assert warnings_of(numbers) == [
        "completions shrank from 20.0 to 5.0 tokens: look whether the policy only learned to stop"
    ]
    assert warnings_of({}) == []


def test_good_share_is_beaten_by_a_good_token(policy):
    reward, before, after = measured(policy, lambda p, c, ids: good_share(ids))
    assert behaviour(policy, reward, before, after, HOW)["baselines"]["token"]["reward"] == 1
