"""`saerl rlhf algo=...` on a tiny planted language: one run directory for every algorithm, resume, warnings."""

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from rl_fixtures import tiny_sae
from test_rl_job import TINY, begin, do, lines

from saerl_cli.config import typed
from saerl_cli.config.rlhf import RlhfConfig
from saerl_cli.jobs import rlhf as job
from saerl_cli.models import folder_sha256
from saerl_cli.rl import outcome
from saerl_cli.run.directory import Run

ROLLOUTS = {"phases": 3, "rollouts": 16, "minibatches": 2, "max_new_tokens": 8}
SUPERVISED = {"phases": 3, "steps": 4, "batch_size": 8, "max_new_tokens": 8}
ALGOS = {
    "ppo": {**ROLLOUTS, "epochs": 2, "group": 2, "critic": "separate", "stop_epochs_kl": 0.5},
    "grpo": {**ROLLOUTS, "epochs": 1, "group": 4},
    "rloo": {**ROLLOUTS, "epochs": 1},
    "sft": {**SUPERVISED, "attribute": "arithmetic"},
    "dpo": {**SUPERVISED, "pairs": {"count": 64, "heldout": 16}, "kl_coef": 0.1},
    "rwr": {**SUPERVISED, "draws": 64, "group": 8, "kl_coef": 0.4},
}


@pytest.fixture(scope="module")
def saes(tiny_planted_model, tmp_path_factory) -> Path:
    """A random SAE at one MLP output."""
    folder = tmp_path_factory.mktemp("saes")
    sae = tiny_sae(folder, "mlp_out.1")
    config = json.loads((sae / "cfg.json").read_text())
    config["metadata"]["saerl"]["model_sha256"] = folder_sha256(tiny_planted_model)
    (sae / "cfg.json").write_text(json.dumps(config))
    return folder


def settings(algo: str, saes: Path | None, *overrides: str) -> RlhfConfig:
    """A tiny run against cursing; `saes` None trains every weight."""
    adapter = {"kind": "sparse_coeffs", "saes": str(saes), "lr": 5e-2} if saes else {"kind": "full", "lr": 1e-3}
    fixed = {
        "model": {"planted": TINY},
        "adapter": adapter,
        "reward": {"parts": {"cursing": {"kind": "planted", "attribute": "cursing", "weight": -1.0}}},
        "algo": {"kind": algo, **ALGOS[algo]},
        "evaluation": {"samples": 16, "tracked": 8, "batch_size": 16, "every": 1, "heldout_tokens": 500},
        "launch": {"cpu": True},
        "checkpoint_every": 1,
    }
    words = OmegaConf.from_dotlist(list(overrides))
    return typed(OmegaConf.merge(OmegaConf.structured(RlhfConfig), fixed, words), RlhfConfig)


@pytest.mark.parametrize("algo", ALGOS)
def test_a_run_its_files_and_its_resume(saes, tmp_path, monkeypatch, algo):
    config = settings(algo, saes)
    job.check(config)
    whole = do(tmp_path / "whole", config)
    summary, metrics = whole.read_summary(), lines(whole.path / "metrics.jsonl")
    assert summary["algo"] == algo and summary["frozen_unchanged"] is True
    assert (summary["value_parameters"] > 0) == (algo == "ppo")
    assert summary["samples"] == {"sft": 96, "dpo": 96, "rwr": 96}.get(algo, 48)
    assert summary.keys() >= {"reward_after", "kl", "kl_exact", "nll_heldout_after", "top_features", "warnings"}
    assert [row["phase"] for row in metrics] == [1, 2, 3]
    assert all(math.isfinite(value) for row in metrics for value in row.values())
    assert all(row.keys() >= {"grad_norm", "lr", "seconds", "updates", "eval_reward", "eval_kl"} for row in metrics)
    samples = lines(whole.path / "samples.jsonl")
    assert len(samples) == 32 and all(row["kl"] == 0 for row in samples[:8]), "step 0 is the untouched model"
    run = begin(tmp_path / "killed", config)
    with monkeypatch.context() as patch:
        patch.setattr(job, "progress", killed_after(2))
        with pytest.raises(KeyboardInterrupt):
            job.work(config, run, Accelerator(cpu=True))
    run.end("interrupted")
    do(tmp_path / "killed", config)
    for name in ("adapter/adapter_model.safetensors", "samples.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (whole.path / name).read_bytes(), name
    untimed = [
        [{key: value for key, value in row.items() if "second" not in key} for row in rows]
        for rows in (metrics, lines(tmp_path / "killed" / "metrics.jsonl"))
    ]
    assert untimed[0] == untimed[1]


def killed_after(phases: int):
    """`progress` that dies at the end of a phase, before its checkpoint."""

    def progress(metrics):
        if metrics["phase"] == phases:
            raise KeyboardInterrupt
        return ""

    return progress


@pytest.mark.parametrize("algo", ["grpo", "rloo", "sft", "dpo", "rwr"])
def test_every_weight(tmp_path, algo):
    run = do(tmp_path, settings(algo, None))
    summary = run.read_summary()
    assert summary["kl_exact"] > 0 and (run.path / "model" / "model.safetensors").is_file()
    assert summary["trainable_parameters"] > 40_000 and summary["value_parameters"] == 0


def test_draws_are_kept_and_weigh_what_the_reward_says(saes, tmp_path):
    run = do(tmp_path, settings("rwr", saes))
    drawn = lines(run.path / "draws.jsonl")
    assert len(drawn) == 64 and len({row["prompt"] for row in drawn}) == 8
    rewards = torch.tensor([row["reward"] for row in drawn]).view(8, 8)
    weights = torch.tensor([row["weight"] for row in drawn]).view(8, 8)
    torch.testing.assert_close(weights.sum(1), torch.full((8,), 8.0))
    for rows, own in zip(rewards, weights, strict=True):
        assert torch.allclose((own / own[0]).log(), (rows - rows[0]) / 0.4, atol=1e-4)
    record = run.record["draws"]
    assert record["completions"] == 64 and 1 <= record["effective_a_prompt"] <= 8


def test_more_draws_than_prompts_are_refused(saes, tmp_path):
    with pytest.raises(ValueError, match=r"algo\.draws=1000000 at algo\.group=2 takes 500000 prompts, but there are"):
        do(tmp_path, settings("rwr", saes, "algo.draws=1000000", "algo.group=2"))


@pytest.mark.parametrize("value", ["nan", "None", "'high'", "[1.0]"])
@pytest.mark.parametrize("algo", ["ppo", "grpo", "rloo"])
def test_a_reward_that_is_no_number_stops_the_run(saes, tmp_path, monkeypatch, algo, value):
    (tmp_path / "bad_reward.py").write_text(
        f"nan = float('nan')\ndef f(prompts, completions, completion_ids):\n    return [{value}] * len(prompts)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "bad_reward", raising=False)
    words = (
        "reward.parts.cursing.kind=python",
        "reward.parts.cursing.attribute=null",
        "reward.parts.cursing.function=bad_reward:f",
    )
    with pytest.raises(
        ValueError, match="the reward part 'cursing' returned .*it must return a finite number"
    ) as caught:
        do(tmp_path / "run", settings(algo, saes, *words))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "says"), [("'high'", "returned str"), ("None", "returned NoneType"), ("[1.0]", "1 sc")]
)
def test_a_reward_of_another_form_stops_the_run(saes, tmp_path, monkeypatch, value, says):
    (tmp_path / "bad_form.py").write_text(f"def f(prompts, completions, completion_ids):\n    return {value}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "bad_form", raising=False)
    words = (
        "reward.parts.cursing.kind=python",
        "reward.parts.cursing.attribute=null",
        "reward.parts.cursing.function=bad_form:f",
    )
    with pytest.raises(ValueError, match=f"the reward part 'cursing' .*{says}"):
        do(tmp_path / "run", settings("grpo", saes, *words))


# --- supervised ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splice", ["pre_activation", "reconstruct"])
def test_the_effect_of_inserting_is_told_from_that_of_training(saes, tmp_path, splice):
    run = do(tmp_path, settings("sft", saes, f"adapter.splice={splice}"))
    summary = run.read_summary()
    assert summary["insertion_effect"] == summary["loss_inserted"] - summary["loss_base"]
    assert summary["training_effect"] == summary["loss_trained"] - summary["loss_inserted"] < 0
    if splice == "pre_activation":
        assert summary["insertion_effect"] == 0, "it keeps the error"
    else:
        assert summary["insertion_effect"] > 0, "a random SAE reconstructs badly"
        assert run.record["insertion"]["loss_inserted"] == summary["loss_inserted"]


def test_a_loss_that_does_not_move_is_told(saes, tmp_path, capsys):
    summary = do(tmp_path, settings("sft", saes, "adapter.lr=1e-9")).read_summary()
    assert any("the loss has not moved in 12 steps" in warning for warning in summary["warnings"])
    assert "the loss has not moved in 12 steps" in " ".join(capsys.readouterr().err.split())


def test_a_splice_that_improves_the_loss_by_itself_is_told():
    """Newhouse and Bashkansky's numbers: 6.449 base, 6.270 inserted, 6.270 after training."""
    says = outcome.insertion_warning({"loss_base": 6.449, "loss_inserted": 6.270})
    assert "inserting the untouched splice alone improves the loss, 6.449 -> 6.270" in says
    assert outcome.insertion_warning({"loss_base": 3.193, "loss_inserted": 3.201}) == ""
    assert outcome.insertion_warning({"loss_base": 3.193, "loss_inserted": 3.193}) == ""


def test_a_gradient_of_nought_is_told(saes, tmp_path, capsys, monkeypatch):
    from saerl_cli.rl.training.supervised import SFTTrainer

    true = SFTTrainer.compute_loss
    monkeypatch.setattr(SFTTrainer, "compute_loss", lambda self, *args, **kwargs: true(self, *args, **kwargs) * 0)
    summary = do(tmp_path, settings("sft", saes)).read_summary()
    assert any("nothing is learned" in warning for warning in summary["warnings"])
    assert capsys.readouterr().err.count("nothing is learned") == 2, "after the first phase, and at the end"


def test_examples_teach_their_completions_alone(saes, tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "the food was", "completion": " good ."}, {"prompt": "it was", "completion": " bad and cold ."}]
    file.write_text("".join(json.dumps(rows[i % 2]) + "\n" for i in range(40)))
    config = settings("sft", saes, f"algo.examples={file}", "algo.attribute=null")
    job.check(config)
    summary = do(tmp_path / "run", config).read_summary()
    assert summary["training_effect"] < 0


def test_rows_and_labels(tiny_planted_model):
    from saerl_cli.data.examples import Example
    from saerl_cli.rl.training.examples import example_row, fitting, packed_row

    assert packed_row([9, 4, 5, 9, 6, 9, 9, 9])["labels"] == [-100, 4, 5, 9, 6, 9, -100, -100]

    class Tokenizer:
        eos_token_id, bos_token_id = 1, None

        def __call__(self, text, **_):
            return {"input_ids": [10 + len(word) for word in text.split()]}

    row = example_row(Example("a bb", "ccc"), Tokenizer())
    assert row == {"input_ids": [11, 12, 13, 1], "labels": [-100, -100, 13, 1]}
    assert len(fitting([row, {**row, "input_ids": [0] * 9}], 8, "train")) == 1
    with pytest.raises(ValueError, match="none of the 1 train sequences fits the model's context of 3 tokens"):
        fitting([row], 3, "train")


def test_preferences_grow(saes, tmp_path):
    summary = do(tmp_path, settings("dpo", saes, "algo.phases=6", "algo.max_new_tokens=4")).read_summary()
    assert summary["pairs_accuracy"] > 0.7 and summary["pairs_margin"] > 0


# --- a KL target ------------------------------------------------------------------------------------------------------


def test_a_target_that_is_not_met_is_told(saes, tmp_path, capsys):
    summary = do(tmp_path, settings("grpo", saes, "algo.kl_target=20")).read_summary()
    assert summary["kl_target"] == 20 and summary["kl_target_met"] is False
    assert any("algo.kl_target=20 was not met: the KL at the end is" in warning for warning in summary["warnings"])
    said = " ".join(capsys.readouterr().err.split())
    assert "is more than the best reward costs" in said and "was not met" in said


def test_what_the_best_reward_costs():
    assert outcome.unreachable(0.5, [0.0] * 50 + [-1.0] * 50) == ""
    assert "about 0.69 nats would do" in outcome.unreachable(0.8, [0.0] * 50 + [-1.0] * 50)
    assert outcome.unreachable(8.0, [float(i) for i in range(100)]) == "", "one sample tells nothing of a tail"


def test_a_run_of_another_group_size_is_not_resumed(saes, tmp_path):
    from saerl_cli.rl.build import build_setup, build_trainer

    run = do(tmp_path, settings("grpo", saes))
    parts = build_setup(settings("grpo", saes, "algo.group=2"), Run(tmp_path), "cpu")
    with pytest.raises(ValueError, match="made with group=4, this run has 2"):
        build_trainer(parts).train(resume_from_checkpoint=str(run.checkpoints()[-1][1]))
