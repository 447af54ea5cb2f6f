"""Rewards: what they count, what they refuse, and how they look before training."""

import json
import struct

import pytest
import torch
from rl_fixtures import WORDS, shape, word_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPTNeoXForCausalLM,
    GPTNeoXForSequenceClassification,
    PreTrainedTokenizerFast,
)

from saerl_cli.config.reward import Per, RewardConfig, RewardPart
from saerl_cli.rewards.lexicon import Lexicon, read_lexicon
from saerl_cli.rewards.score import Part, Reward, build_reward, check_reward, spread


def config_of(**parts):
    return RewardConfig(parts={name: RewardPart(**part) for name, part in parts.items()})


# --- lexicon ---------------------------------------------------------------------------------------------------------


def test_lexicon_counts_whole_words_in_any_case_and_longest_first():
    lexicon = Lexicon({"ass": -1, "damn": -2, "damn fool": -5, "c++": 3})
    assert lexicon("Assess the class") == 0
    assert lexicon("ASS, damn it") == -3
    assert lexicon("you damn fool, damn") == -7
    assert lexicon("c++ is c++.") == 6


def test_lexicon_per_word():
    assert Lexicon({"bad": 1}, per_word=True)("bad bad good day") == 0.5
    assert Lexicon({"bad": 1}, per_word=True)("") == 0


def test_lexicon_file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("happy\nSad\t-1.5\n\nvery glad\t2\t0.3\tignored\nhappy\t3\n")
    assert read_lexicon(path) == {"happy": 3, "sad": -1.5, "very glad": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("good\t1\nbad\tminus one\n", "line 2: 'minus one' is not a number"),
        ("good\n\t2\n", "line 2: a weight without a word"),
        ("\n\n", "is empty"),
    ],
)
def test_malformed_lexicon_names_the_line(tmp_path, text, message):
    (tmp_path / "words.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        check_reward(config_of(nice={"kind": "lexicon", "path": str(tmp_path / "words.txt")}))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"kind": "lexicon", "path": "/nowhere/words.txt"}, "cannot read the word list /nowhere/words.txt"),
        ({"kind": "lexicon", "words": {"good": float("nan")}}, "'good' must be a finite number"),
        ({"kind": "python", "function": "no_such_module_here:f"}, "cannot import 'no_such_module_here'"),
        ({"kind": "python", "function": "json:no_such_function"}, "has no function 'no_such_function'"),
        ({"kind": "python", "function": "json"}, "must read module:function"),
        ({"kind": "hf", "path": "/nowhere/model"}, "there is no folder /nowhere/model"),
        ({"kind": "vader", "weight": float("inf")}, "weight must be a finite number"),
    ],
)
def test_refusals_name_the_part_in_one_line(part, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_reward(config_of(mine=part))
    assert str(caught.value).startswith("reward.parts.mine: ") and "\n" not in str(caught.value)


def test_unknown_planted_attribute_lists_those_there_are():
    language = pytest.importorskip("saerl_cli.planted.language")
    with pytest.raises(ValueError, match="unknown attribute 'swearing'; there are .*cursing"):
        check_reward(config_of(mine={"kind": "planted", "attribute": "swearing"}))
    assert "cursing" in language.ATTRIBUTES


# --- sums ------------------------------------------------------------------------------------------------------------


def constant(value):
    return lambda prompts, completions, completion_ids: [value] * len(completions)


def test_weighted_sum_with_every_part():
    tokenizer = word_tokenizer()
    config = config_of(
        good={"kind": "lexicon", "words": {"w1": 1.0}, "weight": 2.0},
        share={"kind": "lexicon", "words": {"w2": 1.0}, "weight": -1.0, "per": Per.token},
    )
    scores = build_reward(config, tokenizer).score(["w0", "w0"], ["w1 w1", "w1 w2"], [[3, 3], [3, 4]])
    assert scores == {"good": [2, 1], "share": [0, 0.5], "reward": [4, 1.5]}


def test_python_function_sees_ids(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_for_test.py").write_text(
        "def ended(prompts, completions, completion_ids):\n    return [float(ids[-1] == 1) for ids in completion_ids]\n"
    )
    monkeypatch.chdir(tmp_path)
    config = config_of(ended={"kind": "python", "function": "my_rewards_for_test:ended"})
    check_reward(config)
    scores = build_reward(config, word_tokenizer()).score(["w0", "w0"], ["w1", "w1"], [[3, 1], [3]])
    assert scores["reward"] == [1, 0]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_refused_by_name(value):
    reward = Reward((Part("good", 1.0, constant(1.0)), Part("broken", 1.0, constant(value))))
    with pytest.raises(ValueError, match="'broken' returned .* for the completion 'w1'"):
        reward.score(["w0"], ["w1"], [[3]])


def test_wrong_number_of_scores_is_refused_by_name():
    with pytest.raises(ValueError, match="'short' returned 1 scores for 2 completions"):
        Reward((Part("short", 1.0, lambda *_: [0.0]),)).score(["a", "b"], ["a", "b"], [[3], [3]])


def test_a_part_called_reward_is_refused():
    with pytest.raises(ValueError, match="call the part something else"):
        build_reward(config_of(reward={"kind": "vader"}), word_tokenizer())


def test_vader_knows_good_from_bad():
    reward = build_reward(config_of(mood={"kind": "vader"}), word_tokenizer())
    good, bad = reward.score(["", ""], ["a wonderful film", "a terrible film"], [[], []])["mood"]
    assert good > 0.3 and bad < -0.3


def test_spread():
    assert spread([2.0, 2.0, 2.0]) == {"mean": 2, "std": 0, "ties": 1, "coverage": 0}
    seen = spread([0.0, 0.0, 0.0, 4.0])
    assert seen == {"mean": 1, "std": 2, "ties": 0.5, "coverage": 0.25}


# --- reward models ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward_model")
    torch.manual_seed(0)
    model = GPTNeoXForSequenceClassification(shape(num_labels=1))
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def hf_part(folder, **more):
    return config_of(rm={"kind": "hf", "path": str(folder), **more})


def test_reward_model_scores_alone_as_in_a_padded_batch_and_sees_the_end(reward_model):
    check_reward(hf_part(reward_model))
    prompts, ids = ["w0 w1"] * 4, [[5, 6, 7, 1], [5], [5, 6, 7], [9, 9, 9, 9, 9, 1]]
    texts = [" ".join(WORDS[i] for i in row if i != 1) for row in ids]
    together = build_reward(hf_part(reward_model), word_tokenizer()).score(prompts, texts, ids)["rm"]
    chunked = build_reward(hf_part(reward_model, batch_size=3), word_tokenizer()).score(prompts, texts, ids)["rm"]
    alone = build_reward(hf_part(reward_model, batch_size=1), word_tokenizer()).score(prompts, texts, ids)["rm"]
    assert together == pytest.approx(alone, abs=1e-6) and chunked == pytest.approx(alone, abs=1e-6)
    assert abs(alone[0] - alone[2]) > 1e-4, "the end token must reach the reward model"
    model = GPTNeoXForSequenceClassification.from_pretrained(reward_model).eval()
    want = model(torch.tensor([[2, 3, 5, 6, 7, 1]])).logits.item()
    assert alone[0] == pytest.approx(want, abs=1e-6)


def test_reward_model_with_another_tokenizer_is_given_text(reward_model):
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(reversed(WORDS))}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    same = build_reward(hf_part(reward_model), word_tokenizer()).score(["w0 "], ["w3 w4"], [[5, 6, 1]])["rm"]
    ids = other("w3 w4")["input_ids"] + [other.eos_token_id]
    assert build_reward(hf_part(reward_model), other).score(["w0 "], ["w3 w4"], [ids])["rm"] == pytest.approx(same)


def test_a_tokenizer_that_cannot_represent_the_policy_is_refused(reward_model, shared_data):
    from transformers import AutoTokenizer

    pythia = AutoTokenizer.from_pretrained(shared_data / "pythia_tokenizer")
    message = r"has another tokenizer, to which \d+ of \d+ tokens of the policy are unknown, for instance '"
    with pytest.raises(ValueError, match=message) as caught:
        build_reward(hf_part(reward_model), pythia)
    assert "\n" not in str(caught.value)


def test_an_end_is_kept_for_another_tokenizer_whichever_token_the_policy_ends_with(reward_model, shared_data, tmp_path):
    """The story models end a text with the token that begins one; the reward model must see an end all the same."""
    from transformers import AutoTokenizer

    stories = AutoTokenizer.from_pretrained(shared_data / "neox_stories_nano")
    pythia = AutoTokenizer.from_pretrained(shared_data / "pythia_tokenizer")
    torch.manual_seed(0)
    GPTNeoXForSequenceClassification(shape(num_labels=1, vocab_size=50304)).save_pretrained(tmp_path)
    pythia.save_pretrained(tmp_path)
    reward = build_reward(hf_part(tmp_path), stories)
    words = stories("she was happy", add_special_tokens=False)["input_ids"]
    rows = [[*words, 1], [*words, 2], words]
    with_bos, with_eos, open_end = reward.score(["Once "] * 3, ["she was happy"] * 3, rows)["rm"]
    assert with_bos == with_eos and abs(with_bos - open_end) > 1e-5


def test_scores_do_not_depend_on_the_side_of_the_padding(reward_model):
    from saerl_cli.rewards.classifier import score_rows

    model = GPTNeoXForSequenceClassification.from_pretrained(reward_model).eval()
    rows = [[5, 6, 7, 1], [5, 1], [9, 9, 9, 9, 9, 1]]
    ids = torch.tensor([[0] * (6 - len(row)) + row for row in rows])
    left = model(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, 0].tolist()
    assert score_rows(model, rows, 0, 3) == pytest.approx(left, abs=1e-5)


def test_causal_model_is_refused_as_reward(tmp_path):
    GPTNeoXForCausalLM(shape()).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds GPTNeoXForCausalLM, which has no score head"):
        check_reward(hf_part(tmp_path))


def test_missing_score_head_is_refused_before_and_at_loading(reward_model, tmp_path):
    for file in reward_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = {k: v for k, v in load_file(tmp_path / "model.safetensors").items() if not k.startswith("score")}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the score head is missing"):
        check_reward(hf_part(tmp_path))
    with pytest.raises(ValueError, match="lacks score.weight: its score head would be newly initialised"):
        build_reward(hf_part(tmp_path), word_tokenizer())


def test_padding_with_the_end_token_is_refused(reward_model, tmp_path):
    for file in reward_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    word_tokenizer(pad_token="<eos>").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pads with its end token"):
        build_reward(hf_part(tmp_path), word_tokenizer())


def test_damaged_weights_are_refused(reward_model, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPTNeoXForSequenceClassification"]}))
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 50) + b"not json")
    with pytest.raises(ValueError, match="no readable safetensors header"):
        check_reward(hf_part(tmp_path))


def test_vader_lexicon_file_is_read(shared_data):
    weights = read_lexicon(shared_data / "vader" / "vader_lexicon.txt")
    assert len(weights) == 7_494 and weights["lol"] == 1.8 and weights["abandon"] == -1.9


def test_curse_list_is_read_and_matches_whole_words(shared_data):
    weights = read_lexicon(shared_data / "ldnoobw" / "en")
    lexicon = Lexicon(weights)
    assert lexicon("We assess the class in Scunthorpe") == 0 < lexicon("This is shit")


# --- counts, heavy tails, answers ------------------------------------------------------------------------------------


def test_counts_of_a_pattern():
    config = config_of(
        stops={"kind": "count", "pattern": r"\."},
        the={"kind": "count", "pattern": r"(?i)\bthe\b", "per": Per.token},
    )
    scores = build_reward(config, word_tokenizer()).score(["", ""], ["The cat. The other.", ""], [[], []])
    assert scores["stops"] == [2, 0] and scores["the"] == [0.5, 0]


def test_heavy_tails_are_the_quantiles_of_their_distributions():
    from scipy import stats

    from saerl_cli.config.reward import Tail
    from saerl_cli.rewards.patterns import heavy_tailed

    for count in (1, 3, 10, 40):
        rank = stats.expon.cdf(count / 2)
        assert heavy_tailed(count, Tail.exponential, 1.0, 2.0) == count / 2
        assert heavy_tailed(count, Tail.pareto, 3.0, 2.0) == pytest.approx(stats.lomax.ppf(rank, 3.0), rel=1e-4)
        assert heavy_tailed(count, Tail.lognormal, 0.7, 2.0) == pytest.approx(stats.lognorm.ppf(rank, 0.7), rel=1e-4)
        assert heavy_tailed(count, Tail.student_t, 3.0, 2.0) == pytest.approx(
            stats.t.isf(stats.expon.sf(count / 2) / 2, 3.0), rel=1e-4
        )
    for tail in Tail:
        values = [heavy_tailed(count, tail, 2.0, 2.0) for count in (0, 1, 2, 50, 3000)]
        assert values == sorted(values) and 0 <= values[0] <= 1 and values[-1] <= 1e30
    assert heavy_tailed(256, Tail.pareto, 2.0, 4.0) > 1e9, "the blow-up of the injected-error experiment"


def verified(completion, answer, **part):
    config = config_of(right={"kind": "verifier", **part})
    return build_reward(config, word_tokenizer()).score([""], [completion], [[]], [answer])["right"][0]


@pytest.mark.parametrize(
    ("match", "completion", "answer", "want"),
    [
        ("exact", " Five. ", "five", 1),
        ("exact", "five apples", "five", 0),
        ("start", " five . it was", "five", 1),
        ("start", "fiver", "five", 0),
        ("start", "", "five", 0),
        ("numeric", "so 3 and 4 make 1,234.50", "#### 1234.5", 1),
        ("numeric", "it is 72.", "48/2 = 24 and so\n#### 72", 1),
        ("numeric", "#### 7 of 9", "7", 1),
        ("numeric", "it is -3", "3", 0),
        ("numeric", "10-3", "3", 1),
        ("numeric", "10-3", "-3", 0),
        ("numeric", "none", "3", 0),
        ("numeric", "0.3333", "0.3334", 0),
        ("numeric", "$.5", "0.5", 1),
    ],
)
def test_answers(match, completion, answer, want):
    from saerl_cli.config.reward import Match

    assert verified(completion, answer, match=Match(match)) == want


def test_numbers_with_a_tolerance_and_answers_by_pattern():
    from saerl_cli.config.reward import Match

    assert verified("0.3333", "0.3334", match=Match.numeric, tolerance=1e-3) == 1
    pattern = {"match": Match.regex, "pattern": r"answer: (\w+)"}
    assert verified("answer: a, no, answer: B", "b", **pattern) == 1
    assert verified("answer: b, no, answer: a", "b", **pattern) == 0 == verified("b", "b", **pattern)
    assert verified("<think> x </think>", None, match=Match.regex, pattern="<think>.*</think>") == 1


def test_a_verifier_without_an_answer_names_the_prompt():
    with pytest.raises(ValueError, match="the prompt '' has no answer to verify against"):
        verified("five", None)


def test_python_function_may_take_answers(tmp_path, monkeypatch):
    (tmp_path / "my_answers_for_test.py").write_text(
        "def right(prompts, completions, completion_ids, answers):\n"
        "    return [float(a == b) for a, b in zip(completions, answers)]\n"
    )
    monkeypatch.chdir(tmp_path)
    reward = build_reward(config_of(r={"kind": "python", "function": "my_answers_for_test:right"}), None)
    assert reward.score(["", ""], ["a", "b"], [[], []], ["a", "c"])["reward"] == [1, 0]


def test_every_gsm8k_answer_verifies_itself(shared_data):
    from saerl_cli.rewards.patterns import last_number, same_number

    rows = [json.loads(line) for line in (shared_data / "gsm8k" / "train_1000.jsonl").read_text().splitlines()]
    numbers = [last_number(row["answer"]) for row in rows]
    assert None not in numbers and numbers[:2] == [72, 10]
    assert all(same_number(f"The answer is {n:,.0f}.", row["answer"], 0) for n, row in zip(numbers, rows, strict=True))


@pytest.mark.parametrize("value", ["a string", [[1.0]], 3.0])
def test_what_is_no_list_of_numbers_is_refused(value):
    with pytest.raises(ValueError, match="the reward part 'odd' returned"):
        Reward((Part("odd", 1.0, lambda *_: value),)).score(["a"], ["b"], [[3]])
    with pytest.raises(ValueError, match="'odd' returned 'x' for the completion 'b'"):
        Reward((Part("odd", 1.0, lambda *_: ["x"]),)).score(["a"], ["b"], [[3]])


@pytest.mark.parametrize("kind", ["count", "heavy"])
def test_malformed_patterns_are_refused(kind):
    with pytest.raises(ValueError, match=r"reward\.parts\.p: pattern='\(' is no regular expression: missing \)"):
        check_reward(config_of(p={"kind": kind, "pattern": "("}))
    with pytest.raises(ValueError, match=f"kind={kind} needs reward.parts.NAME.pattern=REGEX"):
        RewardPart(kind=kind)
