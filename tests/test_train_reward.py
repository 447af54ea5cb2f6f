"""The job train-reward: what it writes, that it learns, resumes to the bit and refuses what cannot work."""

import json
import shutil
from pathlib import Path

import pytest
from accelerate import Accelerator
from conftest import TINY_PLANTED, TINY_WORDS
from omegaconf import OmegaConf

from saerl_cli.config import typed
from saerl_cli.config.train_reward import TooLong, TrainRewardConfig
from saerl_cli.data.pairs import Pair, read_pairs
from saerl_cli.jobs import train_reward as reward_job
from saerl_cli.rewards.calibration import preference_numbers, reliability, wilson
from saerl_cli.rl.reward_model.rows import encode_pairs
from saerl_cli.run.directory import Run

SMALL = {
    "model": {"planted": TINY_PLANTED},
    "pairs": {"count": 96, "heldout": 40},
    "batch_size": 8,
    "epochs": 2,
    "lr": 2e-3,
    "checkpoint_every": 5,
    "too_long": "drop",
    "launch": {"cpu": True},
}


def settings(*words: str) -> TrainRewardConfig:
    fixed = OmegaConf.merge(OmegaConf.structured(TrainRewardConfig), SMALL, OmegaConf.from_dotlist(list(words)))
    return typed(fixed, TrainRewardConfig)


def begin(path: Path, config: TrainRewardConfig) -> Run:
    run = Run(path)
    run.start("train_reward", "saerl train-reward", config.seed)
    return run


def do(path: Path, config: TrainRewardConfig) -> Run:
    run = begin(path, config)
    reward_job.work(config, run, Accelerator(cpu=True))
    run.end("completed")
    return run


def lines(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "samples_per_second")} for row in rows]


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_ties_are_neither_right_nor_wrong():
    found = preference_numbers([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0])
    assert (found["right"], found["wrong"], found["ties"], found["coverage"]) == (2, 1, 1, 0.75)
    assert found["accuracy"] == pytest.approx(2 / 3) and found["margin"] == 0.25
    tied = preference_numbers([1.0], [1.0])
    assert (tied["accuracy"], tied["accuracy_interval"], tied["ece"]) == (0.5, [0.0, 1.0], 0.0)


def test_wilson_interval_against_its_published_values():
    assert wilson(0, 10) == pytest.approx([0.0, 0.2775], abs=1e-4)
    assert wilson(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)


def test_reliability_compares_confidence_with_accuracy():
    table, ece = reliability([4.0, 4.0, 4.0, -4.0, 0.0])  # sure of four, right about three
    (row,) = table
    assert row["pairs"] == 4 and row["accuracy"] == 0.75 and row["confidence"] == pytest.approx(0.98201, abs=1e-5)
    assert ece == pytest.approx(0.98201 - 0.75, abs=1e-5) and row["low"] <= row["confidence"] <= row["high"]


# --- token ids -------------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one token a character, that begins texts with 99."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [99] * add_special_tokens + [ord(c) - 96 for c in text]}


def test_prompts_are_cut_from_the_left_and_replies_never():
    pairs = [Pair("abc", "d", "ef"), Pair("abcdef", "x", "yz"), Pair("a", "bcdefghi", "j")]
    rows = encode_pairs(pairs, Letters(), end=50, longest=7, too_long=TooLong.cut)
    assert rows.chosen == [[99, 1, 2, 3, 4, 50], [3, 4, 5, 6, 24, 50]]
    assert rows.rejected == [[99, 1, 2, 3, 5, 6, 50], [3, 4, 5, 6, 25, 26, 50]]
    assert (rows.cut, rows.left_out, rows.pairs) == (1, 1, pairs[:2])
    dropped = encode_pairs(pairs, Letters(), end=50, longest=7, too_long=TooLong.drop)
    assert (dropped.cut, dropped.left_out, dropped.pairs) == (0, 2, pairs[:1])


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny_planted_model, tmp_path_factory) -> Run:
    config = settings()
    reward_job.check(config)
    return do(tmp_path_factory.mktemp("reward"), config)


def test_summary_says_right_wrong_ties_and_calibration(finished):
    summary = finished.read_summary()
    assert summary["right"] + summary["wrong"] + summary["ties"] == summary["pairs"]
    low, high = summary["accuracy_interval"]
    assert low < summary["accuracy"] < high and summary["accuracy"] > 0.8, "curse words are easy to see"
    assert summary["accuracy"] > summary["accuracy_before"]
    assert sum(row["pairs"] for row in summary["reliability"]) == summary["pairs"] - summary["ties"]
    assert summary["pairs_trained"] + summary["pairs"] + summary["too_long"] == 136
    assert summary["too_long"] > 0, "some are longer than 64 tokens"
    assert summary["steps"] == 2 * (summary["pairs_trained"] // 8) == 22
    assert sum(summary["longer"].values()) == summary["pairs"]
    metrics = lines(finished.path / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 23))
    assert summary["tokens"] > 1000


def test_the_model_serves_as_reward_at_once(finished, tiny_planted_model):
    """Scores of the finished model through `kind=hf` give the summary's numbers: one code path, end token included."""
    from transformers import AutoTokenizer

    from saerl_cli.config.reward import RewardConfig, RewardPart
    from saerl_cli.rewards.score import build_reward, check_reward

    config = RewardConfig(parts={"rm": RewardPart(kind="hf", path=str(finished.path / "model"))})
    check_reward(config)
    tokenizer = AutoTokenizer.from_pretrained(tiny_planted_model)
    reward = build_reward(config, tokenizer)
    pairs = read_pairs(settings().pairs, settings().model, "heldout")
    pairs = encode_pairs(pairs, tokenizer, tokenizer.eos_token_id, 64, TooLong.drop).pairs

    def scores(texts):
        ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
        return reward.score([pair.prompt for pair in pairs], texts, ids)["rm"]

    found = preference_numbers(scores([p.chosen for p in pairs]), scores([p.rejected for p in pairs]))
    summary = finished.read_summary()
    assert (found["right"], found["wrong"]) == (summary["right"], summary["wrong"])
    assert found["margin"] == pytest.approx(summary["margin"], abs=1e-5)


def test_killed_and_started_again_ends_with_the_same_bits(finished, tmp_path, monkeypatch):
    from saerl_cli.rl.reward_model.trainer import RewardTrainer

    config, true = settings(), RewardTrainer.compute_loss

    def dies(self, *args, **kwargs):
        if self.state.global_step == 17:  # in the second epoch, between two checkpoints
            raise KeyboardInterrupt
        return true(self, *args, **kwargs)

    run = begin(tmp_path, config)
    with monkeypatch.context() as patch:
        patch.setattr(RewardTrainer, "compute_loss", dies)
        with pytest.raises(KeyboardInterrupt):
            reward_job.work(config, run, Accelerator(cpu=True))
    run.end("interrupted")
    do(tmp_path, config)
    name = "model/model.safetensors"
    assert (tmp_path / name).read_bytes() == (finished.path / name).read_bytes()
    assert lines(tmp_path / "metrics.jsonl") == lines(finished.path / "metrics.jsonl")
    drop = {"seconds"}
    again, once = run.read_summary(), finished.read_summary()
    assert {k: v for k, v in again.items() if k not in drop} == {k: v for k, v in once.items() if k not in drop}
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.p*t*h")), "nothing pickled"


def test_half_the_micro_batch_is_the_same_training(finished, tmp_path):
    halves = do(tmp_path, settings("micro_batch=4", "epochs=1"))
    whole = lines(finished.path / "metrics.jsonl")[0]
    assert lines(halves.path / "metrics.jsonl")[0]["loss"] == pytest.approx(whole["loss"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_train_the_same_and_resume_to_the_bit(saerl, tiny_planted_model, empty_place):
    words = ["pairs.count=64", "pairs.heldout=40", "lr=2e-3", "batch_size=8", "epochs=2", "checkpoint_every=3"]
    words = ["train-reward", *TINY_WORDS, *words, "launch.cpu=true", "launch.threads=1", "launch.num_processes=2"]
    for folder, more in (("two", []), ("one", ["launch.num_processes=1"])):
        done = saerl(*words, f"hydra.run.dir={folder}", *more)
        assert done.returncode == 0, done.stderr
    losses = [[row["loss"] for row in lines(empty_place / name / "metrics.jsonl")] for name in ("two", "one")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    again = shutil.copytree(empty_place / "two", empty_place / "again")
    folder, kept = max(Run(again).checkpoints())[1], min(Run(again).checkpoints())[0]
    assert kept % 7, "inside an epoch of seven steps"
    for path in (folder, again / "model"):
        shutil.rmtree(path)
    Run(again).update(status="interrupted")
    done = saerl(*words, "hydra.run.dir=again")
    assert done.returncode == 0, done.stderr
    name = "model/model.safetensors"
    assert (again / name).read_bytes() == (empty_place / "two" / name).read_bytes()
    assert lines(again / "metrics.jsonl") == lines(empty_place / "two" / "metrics.jsonl")


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pairs.attribute=swearing"], "pairs.attribute='swearing' is unknown"),
        (["pairs.kind=file", "pairs.path=/nowhere.jsonl"], "pairs.path=/nowhere.jsonl does not exist"),
        (["batch_size=97"], "there are 96 training pairs, but a step takes batch_size=97"),
        (["max_length=65"], "max_length=65 exceeds the model's context of 64 tokens"),
        (["model.dtype=bfloat16"], "rounds away; write model.dtype=float32"),
        (["micro_batch=3"], "micro_batch=3 must divide 8 pairs"),
    ],
)
def test_refusals_before_work(words, message):
    with pytest.raises(ValueError, match=message):
        reward_job.check(settings(*words))


def test_a_tokenizer_that_pads_with_its_end_token_is_refused(tmp_path):
    from rl_fixtures import tiny_model, word_tokenizer

    tiny_model(tmp_path)
    word_tokenizer(pad_token="<eos>").save_pretrained(tmp_path)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(20 * (json.dumps({"prompt": "w1", "chosen": " w2", "rejected": " w3"}) + "\n"))
    words = ["model.kind=local", f"model.path={tmp_path}", "pairs.kind=file", f"pairs.path={pairs}", "pairs.heldout=2"]
    with pytest.raises(ValueError, match="pads with its end token, so a score would be read before the end"):
        reward_job.check(settings(*words))


def test_the_checks_import_no_torch():
    import subprocess
    import sys

    code = "import sys, saerl_cli.jobs.train_reward; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
