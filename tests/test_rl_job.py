"""The jobs rlhf and evaluate on a tiny planted language: refusals, run directory, resuming, proof of restriction."""

import json
import math
from pathlib import Path

import pytest
from accelerate import Accelerator
from omegaconf import OmegaConf
from rl_fixtures import tiny_sae

from saerl_cli.config import typed
from saerl_cli.config.evaluate import EvaluateConfig
from saerl_cli.config.rlhf import RlhfConfig
from saerl_cli.jobs import evaluate as evaluate_job
from saerl_cli.jobs import rlhf as job
from saerl_cli.models import folder_sha256
from saerl_cli.rl.evaluation.behaviour import BEATEN
from saerl_cli.run.directory import Run

TINY = {"documents": 400, "hidden_size": 32, "layers": 2, "heads": 2, "context_size": 64, "steps": 60, "batch_size": 16}
SMALL = {
    "algo": {"phases": 3, "rollouts": 16, "minibatches": 2, "epochs": 2, "max_new_tokens": 8},
    "evaluation": {"samples": 16, "batch_size": 16, "every": 1, "heldout_tokens": 500},
    "launch": {"cpu": True},
    "checkpoint_every": 1,
}


@pytest.fixture(scope="module")
def saes(tiny_planted_model, tmp_path_factory) -> Path:
    """Random SAEs at both MLP outputs, which say which model they belong to."""
    folder = tmp_path_factory.mktemp("saes")
    for site in ("mlp_out.0", "mlp_out.1"):
        sae = tiny_sae(folder, site)
        config = json.loads((sae / "cfg.json").read_text())
        config["metadata"]["saerl"]["model_sha256"] = folder_sha256(tiny_planted_model)
        (sae / "cfg.json").write_text(json.dumps(config))
    return folder


SILENT = (
    "reward.parts.cursing.attribute=null",
    "reward.parts.cursing.kind=lexicon",
    "reward.parts.cursing.words={zzz: 1.0}",
)
"""A reward for a word that the language does not have."""


def settings(saes: Path | None, *overrides: str) -> RlhfConfig:
    """A tiny run against cursing; `saes` None trains every weight."""
    adapter = {"kind": "sparse_coeffs", "saes": str(saes), "lr": 5e-2} if saes else {"kind": "full", "lr": 1e-3}
    reward = {"parts": {"cursing": {"kind": "planted", "attribute": "cursing", "weight": -1.0}}}
    fixed = {"model": {"planted": TINY}, "adapter": adapter, "reward": reward, **SMALL}
    words = OmegaConf.from_dotlist(list(overrides))
    return typed(OmegaConf.merge(OmegaConf.structured(RlhfConfig), fixed, words), RlhfConfig)


def begin(path: Path, config: RlhfConfig) -> Run:
    (path / ".hydra").mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.structured(config), path / ".hydra" / "config.yaml")
    run = Run(path)
    run.start("rlhf", "saerl rlhf", config.seed)
    return run


def do(path: Path, config: RlhfConfig) -> Run:
    run = begin(path, config)
    job.work(config, run, Accelerator(cpu=True))
    run.end("completed")
    return run


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_sound_run_is_not_refused(saes):
    job.check(settings(saes))
    job.check(settings(None))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.saes=/nowhere"], "no SAEs at /nowhere"),
        (["adapter.sites=[mlp_out.7]"], "there is no SAE of mlp_out.7 in .*; there are mlp_out.0, mlp_out.1"),
        (["model.planted.seed=7", "model.planted.hidden_size=64"], "d_in=32, but the site has width 64"),
        (["model.planted.layers=1"], "mlp_out.1: layer 1 is out of range"),
        (["prompts.count=10"], "10 distinct prompts of 6 tokens, but one phase takes algo.rollouts=16"),
        (["prompts.tokens=1", "algo.rollouts=64"], r"\d+ distinct prompts of 1 tokens"),
        (["algo.max_new_tokens=60"], "max_new_tokens=60 = 66 tokens exceed the model's context of 64"),
        (["prompts.tokens=55"], "distinct prompts of 55 tokens"),
        (["reward.parts.cursing.attribute=swearing"], "reward.parts.cursing: unknown attribute 'swearing'"),
    ],
)
def test_refusals_in_one_line(saes, overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        job.check(settings(saes, *overrides))
    assert "\n" not in str(caught.value)


def test_what_a_kill_left_half_written_is_no_sae(saes, tmp_path):
    import shutil

    shutil.copytree(saes, tmp_path / "saes")
    shutil.copytree(saes / "mlp_out.1", tmp_path / "saes" / ".mlp_out.1.partial.17")
    job.check(settings(tmp_path / "saes"))


def test_sae_of_another_model_is_refused(saes, tiny_planted_model, tmp_path):
    config = json.loads((tiny_sae(tmp_path) / "cfg.json").read_text())
    config["metadata"]["saerl"]["model_sha256"] = "0" * 64
    (tmp_path / "mlp_out.1" / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="was trained on other weights"):
        job.check(settings(tmp_path))


def test_sae_of_another_module_is_refused(tmp_path):
    config = json.loads((tiny_sae(tmp_path) / "cfg.json").read_text())
    config["metadata"]["saerl"]["module"] = "gpt_neox.layers.1.attention"
    (tmp_path / "mlp_out.1" / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="was trained at gpt_neox.layers.1.attention, but mlp_out.1"):
        job.check(settings(tmp_path))


def test_full_training_in_half_precision_is_refused():
    with pytest.raises(ValueError, match="rounds away; write model.dtype=float32 launch.mixed_precision=bf16"):
        job.check(settings(None, "model.dtype=bfloat16"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launch.num_processes=3"], "must be a multiple of launch.num_processes x algo.minibatches = 6"),
        (["algo.micro_batch=3"], "algo.micro_batch=3 must divide the 8 completions"),
        (["algo.rollouts=1", "algo.minibatches=1"], "fewer than two completions a process"),
        (["algo.critic_warmup=3"], "leaves none of algo.phases=3"),
        (["algo.kl_coef=0"], "algo.kl_coef must be > 0"),
    ],
)
def test_contradictions_are_refused_where_a_run_is_composed(saes, overrides, message):
    with pytest.raises(ValueError, match=message):
        settings(saes, *overrides)


def test_the_checks_import_no_torch():
    import subprocess
    import sys

    code = "import sys, saerl_cli.jobs.rlhf, saerl_cli.jobs.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(saes, tmp_path_factory) -> Run:
    return do(tmp_path_factory.mktemp("run"), settings(saes))


def test_summary_has_the_agreed_keys(finished):
    summary = finished.read_summary()
    assert summary.keys() >= {
        "adapter", "trainable_parameters", "value_parameters", "reward_before", "reward_after", "reward_se", "kl",
        "kl_se", "nll_heldout_before", "nll_heldout_after", "steps", "samples", "seconds", "samples_per_second",
        "peak_memory_bytes", "frozen_unchanged", "top_features", "kl_exact", "curse_share_before", "curse_share_after",
    }  # fmt: skip
    assert (summary["trainable_parameters"], summary["value_parameters"]) == (128, 33)
    assert summary["adapter"] == "sparse_coeffs" and summary["frozen_unchanged"] is True
    assert (summary["steps"], summary["samples"]) == (12, 48)
    assert summary["kl_exact"] > 0 and summary["reward_se"] > 0
    assert all(f.keys() == {"site", "feature", "delta", "effect", "label"} for f in summary["top_features"])
    sizes = [feature["effect"] for feature in summary["top_features"]]
    assert sizes == sorted(sizes, reverse=True) and any(feature["label"] for feature in summary["top_features"])
    found = summary["behaviour"]
    best, own = found["baselines"]["string"], found["baselines"]["policy"]
    assert best["reward"] == 0 and best["difference"] == pytest.approx(best["reward"] - own["reward"])  # no curse words
    assert own["objective"] == pytest.approx(own["reward"] - found["baselines"]["kl_coef"] * own["kl"])
    assert found["beaten"] == any(warning.startswith(BEATEN) for warning in summary["warnings"])


def test_metrics_and_samples_begin_at_the_start(finished):
    metrics, samples = lines(finished.path / "metrics.jsonl"), lines(finished.path / "samples.jsonl")
    assert [(row["step"], row["phase"]) for row in metrics] == [(4, 1), (8, 2), (12, 3)]
    assert metrics[0]["kl"] == 0 and metrics[0]["reward/cursing"] == -metrics[0]["reward"]
    assert metrics[-1]["changed"] > 0 and all(math.isfinite(v) for row in metrics for v in row.values())
    assert [row["step"] for row in samples[::8]] == [0, 4, 8, 12] and len(samples) == 32
    assert all(row["kl"] == 0 for row in samples[:8]), "step 0 is the untouched model"
    assert [row["prompt"] for row in samples[:8]] == [row["prompt"] for row in samples[24:]], "the same prompts always"


def test_run_json_says_what_went_in_and_what_moved(finished, saes, tiny_planted_model):
    record = finished.record
    assert record["inputs"]["model"] == {
        "name": "planted",
        "revision": None,
        "sha256": folder_sha256(tiny_planted_model),
    }
    assert record["inputs"]["sae"].keys() == {"mlp_out.0", "mlp_out.1"}
    assert sorted(record["trainable"].values()) == [1, 32, 64, 64]
    assert record["frozen_unchanged"] is True and record["frozen_tensors"] > 20
    assert record["reward_spread"]["reward"].keys() == {"mean", "std", "ties", "coverage"}


def test_the_adapter_is_coefficients_only_and_loads_with_plain_peft(finished, tiny_planted_model):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    import saerl_cli.adapter  # noqa: F401

    tensors = load_file(finished.path / "adapter" / "adapter_model.safetensors")
    assert sorted(t.numel() for t in tensors.values()) == [64, 64]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_planted_model), finished.path / "adapter"
    )
    moved = {(f["site"], f["feature"]): f["delta"] for f in finished.read_summary()["top_features"]}
    from saerl_cli.adapter import deltas

    found = deltas(model)
    assert all(float(found[site][feature]) == delta for (site, feature), delta in moved.items())


def test_the_policy_loads_and_is_the_one_that_was_measured(finished, saes):
    from saerl_cli.rl.build import build_setup
    from saerl_cli.rl.evaluation.measure import cycled, draw
    from saerl_cli.rl.policy import load_policy

    parts = build_setup(settings(saes), finished, "cpu")
    policy = load_policy(finished.path)
    samples = draw(policy, parts.reward, cycled(parts.heldout_prompts, 32), parts.sampling("shown"))
    last = lines(finished.path / "samples.jsonl")[-8:]
    assert samples.texts[:8] == [row["completion"] for row in last]
    assert samples.kl[:8] == pytest.approx([row["kl"] for row in last])
    tracked = lines(finished.path / "metrics.jsonl")[-1]
    assert tracked["eval_reward"] == pytest.approx(sum(samples.scores["reward"]) / 32)
    assert tracked["eval_kl"] == pytest.approx(sum(samples.kl) / 32)
    assert tracked["eval_kl_exact"] == pytest.approx(sum(samples.kl_exact) / 32) and tracked["eval_kl_exact"] > 0


def policies(path: Path) -> dict[str, bytes]:
    """What the folder of snapshots holds."""
    return {file.name: file.read_bytes() for file in (path / "policies").iterdir()}


def test_killed_and_started_again_ends_with_the_same_bits(saes, finished, tmp_path, monkeypatch):
    from saerl_cli.rl.training.phase import PPOTrainer

    config = settings(saes)
    run = begin(tmp_path, config)
    true = PPOTrainer.describe_rollout

    def dies_in_phase_three(self, *args):
        if self.phase == 2:
            raise KeyboardInterrupt
        true(self, *args)

    monkeypatch.setattr(PPOTrainer, "describe_rollout", dies_in_phase_three)
    with pytest.raises(KeyboardInterrupt):
        job.work(config, run, Accelerator(cpu=True))
    monkeypatch.undo()
    run.log(99, stray=1)  # what a kill may leave after its last checkpoint
    (tmp_path / "policies" / "step-9.safetensors").write_bytes(b"of another try")
    (tmp_path / "policies" / ".step-12.safetensors.partial.1").write_bytes(b"half")
    run.end("interrupted")
    do(tmp_path, config)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (finished.path / name).read_bytes()
    assert policies(tmp_path) == policies(finished.path)
    for file in ("metrics.jsonl", "samples.jsonl"):
        strip = [
            [{k: v for k, v in row.items() if "second" not in k} for row in lines(folder / file)]
            for folder in (tmp_path, finished.path)
        ]
        assert strip[0] == strip[1]


def test_killed_while_measuring_trains_no_further(saes, finished, tmp_path, monkeypatch):
    from saerl_cli.rl import summary

    config = settings(saes)
    run = begin(tmp_path, config)
    with monkeypatch.context() as patch:
        patch.setattr(summary, "summarise", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            job.work(config, run, Accelerator(cpu=True))
    run.end("interrupted")
    do(tmp_path, config)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (finished.path / name).read_bytes()
    again, once = run.read_summary(), finished.read_summary()
    assert {k: v for k, v in again.items() if k in ("reward_after", "kl", "kl_exact", "nll_heldout_after")} == {
        k: once[k] for k in ("reward_after", "kl", "kl_exact", "nll_heldout_after")
    }


def test_a_run_begun_with_other_saes_is_not_continued(saes, finished, tmp_path):
    import shutil

    shutil.copytree(finished.path, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["inputs"]["model"]["sha256"] = "0" * 64
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="begun with another model or other SAEs"):
        do(tmp_path / "run", settings(saes))


def test_a_frozen_tensor_that_moves_fails_the_run(saes, tmp_path, monkeypatch):
    from saerl_cli.rl.training.phase import PPOTrainer

    true = PPOTrainer.describe_rollout

    def tamper(self, *args):
        self.model.get_base_model().gpt_neox.layers[0].mlp.sae.W_dec.data[3, 3] += 1e-6
        true(self, *args)

    monkeypatch.setattr(PPOTrainer, "describe_rollout", tamper)
    with pytest.raises(ValueError, match=r"1 of \d+ frozen tensors moved during training, the first is .*sae.W_dec"):
        do(tmp_path, settings(saes))
    run = Run(tmp_path)
    assert run.record["frozen_unchanged"] is False
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "summary.json").exists()


def test_constant_reward_is_reported_before_training(saes, tmp_path, capsys):
    config = settings(saes, "algo.phases=1", *SILENT)
    do(tmp_path, config)
    assert "cursing is 0 for all 16 completions of the untouched model" in capsys.readouterr().err
    assert Run(tmp_path).record["reward_spread"]["cursing"]["coverage"] == 0


def test_full_training_saves_a_plain_model(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = do(tmp_path, settings(None))
    summary = run.read_summary()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], "the value head is no part of the policy"
    assert summary["trainable_parameters"] == sum(p.numel() for p in model.parameters())
    assert AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == "<eos>"
    assert summary["frozen_unchanged"] and summary["top_features"] == [] and "changed" not in summary
    assert lines(tmp_path / "metrics.jsonl")[0]["kl"] == 0
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.p*t*h")), "nothing pickled"


# --- evaluate --------------------------------------------------------------------------------------------------------


def evaluate(policy: Path, path: Path, *overrides: str) -> dict:
    words = [f"policy={policy}", "evaluation.samples=16", "evaluation.heldout_tokens=500", *overrides]
    config = typed(OmegaConf.merge(OmegaConf.structured(EvaluateConfig), OmegaConf.from_dotlist(words)), EvaluateConfig)
    evaluate_job.check(config)
    path.mkdir(exist_ok=True)
    run = Run(path)
    run.start("evaluate", "saerl evaluate", config.seed)
    evaluate_job.work(config, run, Accelerator(cpu=True))
    run.end("completed")
    return run.read_summary()


def test_evaluate_measures_on_samples_of_its_own(finished, tmp_path):
    first = evaluate(finished.path, tmp_path / "a")
    assert first.keys() >= {"reward_before", "reward_after", "kl", "kl_exact", "nll_heldout_after", "curse_share_after"}
    drop = {"seconds"}
    again = evaluate(finished.path, tmp_path / "b")
    assert {k: v for k, v in first.items() if k not in drop} == {k: v for k, v in again.items() if k not in drop}
    other = evaluate(finished.path, tmp_path / "c", "seed=5")
    assert other["kl"] != first["kl"] and other["nll_heldout_after"] == first["nll_heldout_after"]
    assert len(lines(tmp_path / "a" / "samples.jsonl")) == 16
    assert first["behaviour"]["baselines"]["prompts"] == 8 and isinstance(first["warnings"], list)


def test_evaluate_refuses_what_is_no_finished_policy(finished, saes, tmp_path):
    with pytest.raises(ValueError, match="is not a run directory"):
        evaluate(tmp_path, tmp_path / "out")
    begin(tmp_path / "begun", settings(saes)).end("interrupted")
    with pytest.raises(ValueError, match="has no adapter folder: the run has not finished"):
        evaluate(tmp_path / "begun", tmp_path / "out")
