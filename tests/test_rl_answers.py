"""Prompts with right answers, pass@k of the untouched model, and normalised rewards: the parts, and through the job."""

import json
from itertools import combinations

import pytest
import torch
from test_rl_job import begin, do, lines, settings

from saerl_cli.config.groups import PlantedConfig
from saerl_cli.config.reward import Normalise
from saerl_cli.config.rlhf import PromptConfig, PromptKind
from saerl_cli.data.prompts import Question, file_questions, fitting, split_questions
from saerl_cli.jobs import rlhf as job
from saerl_cli.planted.documents import planted_questions
from saerl_cli.planted.language import labels_of, split_words
from saerl_cli.rl.evaluation.passes import pass_at_k, passes
from saerl_cli.rl.training.normalise import Normaliser

RIGHT = (
    "reward.parts.cursing.kind=verifier",
    "reward.parts.cursing.attribute=null",
    "reward.parts.cursing.match=start",
    "reward.parts.cursing.weight=1.0",
    "prompts.kind=arithmetic",
    "algo.max_new_tokens=3",
)


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_arithmetic_questions_end_before_the_result_and_know_the_right_one():
    questions = list(planted_questions(PlantedConfig(documents=300), "train"))
    assert len(questions) > 20
    for prompt, answer in questions:
        words = [*split_words(prompt), answer]
        assert "arithmetic_right" in labels_of(words)[-1]
    lengths = {len(split_words(prompt)) for prompt, _ in questions}
    assert len(lengths) > 5, "they are of many lengths"


def test_training_and_heldout_questions_are_disjoint():
    train, heldout = split_questions(settings(None, *RIGHT))
    assert train and heldout
    assert not {q.prompt for q in train} & {q.prompt for q in heldout}


def test_gsm8k_is_read_as_it_stands(shared_data):
    path = str(shared_data / "gsm8k" / "train_1000.jsonl")
    words = ["prompts.kind=file", f"prompts.path={path}", "prompts.template='Q: {prompt} A:'"]
    config = settings(None, *RIGHT[:4], "reward.parts.cursing.match=numeric", *words)
    job.check_answers(config)
    train, heldout = split_questions(config)
    assert (len(train), len(heldout)) == (900, 100)
    assert train[0].prompt.startswith("Q: Natalia sold clips") and train[0].prompt.endswith(" A:")
    assert train[0].answer.endswith("#### 72")


def test_a_file_may_have_prompts_alone(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two", "answer": 2}\n')
    assert list(file_questions(str(path), None, "answer", "{prompt}")) == [Question("one", None), Question("two", "2")]
    with pytest.raises(ValueError, match="p.jsonl line 1 has no 'prompt' but text; write prompts.field=COLUMN"):
        list(file_questions(str(path), "prompt", "answer", "{prompt}"))


def test_prompts_that_are_all_too_long_are_refused():
    questions = [Question("a b c", "1"), Question("a", "2")]
    assert [p.answer for p in fitting(questions, lambda text: list(range(len(text.split()))), 2)] == ["2"]
    with pytest.raises(ValueError, match="all 2 prompts are longer than 0 tokens"):
        fitting(questions, lambda text: list(range(len(text.split()))), 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (RIGHT[:4], "reward.parts.cursing verifies answers, and documents have none; write prompts.kind=arithmetic"),
        ((*RIGHT, "reward.parts.cursing.match=numeric"), "which holds no number; write match=exact"),
        ((*RIGHT, "algo.max_new_tokens=64"), "algo.max_new_tokens=64 fills the model's context of 64"),
        ((*RIGHT, "algo.max_new_tokens=60"), r"all \d+ prompts are longer than 4 tokens"),
        ((*RIGHT, "prompts.count=3"), "there are 3 distinct prompts that fit, but one phase takes algo.rollouts=16"),
        ((*RIGHT, "prompts.kind=file", "prompts.path=/nowhere.jsonl"), "prompts.path=/nowhere.jsonl does not exist"),
    ],
)
def test_refused_before_work(words, message):
    with pytest.raises(ValueError, match=message) as caught:
        job.check(settings(None, *words))
    assert "\n" not in str(caught.value)


def test_a_row_without_an_answer_is_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "one", "answer": "1"}\n{"prompt": "two"}\n')
    with pytest.raises(ValueError, match="the prompt 'two' has no 'answer'; write prompts.answer_field=COLUMN"):
        job.check_answers(settings(None, *RIGHT[:4], "prompts.kind=file", f"prompts.path={path}"))
    with pytest.raises(ValueError, match="prompts.kind=file needs prompts.path=FILE"):
        PromptConfig(kind=PromptKind.file)


# --- pass@k ----------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer():
    tries = [True, False, False, True, False]
    for k in range(1, 6):
        subsets = list(combinations(tries, k))
        assert pass_at_k(5, 2, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_passes_are_averaged_over_prompts():
    numbers = passes([1.0] * 16 + [0.0] * 16, 2)
    assert numbers["pass_at"] == {"1": 0.5, "2": 0.5, "4": 0.5, "8": 0.5, "16": 0.5}


# --- normalisation ---------------------------------------------------------------------------------------------------


def test_running_statistics_are_those_of_all_scores_however_they_came():
    scores = torch.randn(60, generator=torch.Generator().manual_seed(0)) * 3 + 5
    pieces, whole = Normaliser(Normalise.running), Normaliser(Normalise.running)
    for piece in scores.split(7):
        pieces.learn(piece)
    whole.learn(scores)
    for found in (pieces, whole):
        assert found.mean == pytest.approx(scores.double().mean().item())
        assert found.std == pytest.approx(scores.double().std(correction=0).item())
    assert pieces(scores).mean().item() == pytest.approx(0, abs=1e-6)
    resumed = Normaliser(Normalise.running)
    resumed.load(json.loads(json.dumps(pieces.state())))
    assert torch.equal(resumed(scores), pieces(scores))


def test_clipping_counts_what_it_clips_and_nothing_changes_by_default():
    scores = torch.tensor([1.0, 9.0, -30.0, 3.0])
    assert Normaliser()(scores) is scores
    clipped = Normaliser(clip=5.0)
    assert clipped(scores).tolist() == [1, 5, -5, 3] and clipped.metrics["reward_clipped"] == 0.5
    calibrated = Normaliser(Normalise.calibrate)
    calibrated.calibrate(1.0, 2.0)
    calibrated.learn(scores)
    assert calibrated(scores).tolist() == [0, 4, -15.5, 1]


# --- through the job -------------------------------------------------------------------------------------------------


def test_a_verified_run_measures_pass_at_k_first_and_warns(tiny_planted_model, tmp_path, capsys):
    """Prompts of many lengths, answers through TRL to the verifier; a model this small may be right or never."""
    config = settings(None, *RIGHT, "algo.phases=1", "evaluation.samples=32", "prompts.count=64")
    job.check(config)
    run = do(tmp_path, config)
    found = run.record["base_passes"]["cursing"]
    assert (found["prompts"], found["samples"]) == (2, 16)
    rates = list(found["pass_at"].values())
    assert rates == sorted(rates) and 0 <= rates[0] <= rates[-1] <= 1
    said = capsys.readouterr().err
    assert "cursing, the untouched model on 2 prompts: pass@1" in said
    assert ("is never right in 16 tries" in said) == (rates[-1] == 0)
    summary = run.read_summary()
    assert 0 <= summary["reward_after"] <= 1 and 0 < summary["commonest_after"] <= 1
    assert summary["token_entropy_before"] > 0
    prompts = {row["prompt"] for row in lines(tmp_path / "samples.jsonl")}
    assert len({len(split_words(prompt)) for prompt in prompts}) > 1


@pytest.mark.parametrize("kind", ["calibrate", "running"])
def test_normalised_runs_resume_to_the_bit_and_report_raw_rewards(tiny_planted_model, tmp_path, monkeypatch, kind):
    from saerl_cli.rl.training.phase import PPOTrainer

    config = settings(None, f"reward.normalise={kind}", "reward.clip=1.5")
    whole = do(tmp_path / "whole", config)
    metrics = lines(whole.path / "metrics.jsonl")
    assert all(row["reward"] <= 0 for row in metrics), "the raw reward is minus a count"
    assert all(0 <= row["reward_clipped"] <= 1 and abs(row["reward_normalised"]) < 2 for row in metrics)
    assert whole.read_summary()["reward_after"] <= 0
    true = PPOTrainer.describe_rollout

    def dies_in_phase_three(self, *args):
        if self.phase == 2:
            raise KeyboardInterrupt
        true(self, *args)

    (tmp_path / "parts").mkdir()
    run = begin(tmp_path / "parts", config)
    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "describe_rollout", dies_in_phase_three)
        with pytest.raises(KeyboardInterrupt):
            from accelerate import Accelerator

            job.work(config, run, Accelerator(cpu=True))
    run.end("interrupted")
    do(tmp_path / "parts", config)
    name = "model/model.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    strip = [
        [{k: v for k, v in row.items() if "second" not in k} for row in lines(tmp_path / part / "metrics.jsonl")]
        for part in ("parts", "whole")
    ]
    assert strip[0] == strip[1]


def test_calibration_without_spread_is_refused(tiny_planted_model, tmp_path):
    words = (
        "reward.parts.cursing.kind=lexicon",
        "reward.parts.cursing.attribute=null",
        "reward.parts.cursing.words={zzz: 1.0}",
    )
    with pytest.raises(ValueError, match="which is 0 for every completion of the untouched model"):
        do(tmp_path, settings(None, "reward.normalise=calibrate", "algo.phases=1", *words))
