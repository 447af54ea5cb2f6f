"""Policies kept along the way of a run, and `saerl evaluate` of all of them: the reward-KL frontier and its limits."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import test_rl_job
from test_rl_job import do, evaluate, lines, policies, settings

from saerl_cli.run.directory import Run

saes, finished = test_rl_job.saes, test_rl_job.finished  # fixtures

# --- snapshots -------------------------------------------------------------------------------------------------------


def test_the_policy_is_kept_along_the_way(finished, saes):
    from safetensors.torch import load_file

    from saerl_cli.adapter import deltas
    from saerl_cli.rl import snapshots
    from saerl_cli.rl.policy import load_policy

    assert sorted(policies(finished.path)) == ["step-4.safetensors", "step-8.safetensors"]
    saved = load_file(finished.path / "policies" / "step-8.safetensors")
    assert sorted(t.numel() for t in saved.values()) == [64, 64], "coefficients and nothing else"
    policy = load_policy(finished.path)
    final = deltas(policy.model)
    snapshots.load(policy.model, finished.path / "policies" / "step-8.safetensors")
    kept = deltas(policy.model)
    assert all(any(kept[site].equal(t) for t in saved.values()) for site in kept)
    assert not any(kept[site].equal(final[site]) for site in kept)
    assert lines(finished.path / "metrics.jsonl")[1]["delta_norm"] == pytest.approx(
        sum(float((t**2).sum()) for t in saved.values()) ** 0.5
    )


def test_how_many_policies_are_kept(saes):
    from saerl_cli.rl.snapshots import phases_kept

    long = ["algo.phases=45"]
    assert phases_kept(settings(saes, *long)) == {5, 10, 15, 20, 25, 30, 35, 40}
    assert phases_kept(settings(saes, *long, "snapshots=2")) == {15, 30}
    assert phases_kept(settings(saes)) == {1, 2}, "no more than there are before the last"
    assert phases_kept(settings(None, *long)) == set() == phases_kept(settings(saes, "snapshots=0"))
    assert phases_kept(settings(None, *long, "snapshots=2")) == {15, 30}
    with pytest.raises(ValueError, match="snapshots must be >= 0"):
        settings(saes, "snapshots=-1")


def test_a_snapshot_of_another_run_is_refused(finished, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    from saerl_cli.rl import snapshots
    from saerl_cli.rl.policy import load_policy

    model = load_policy(finished.path).model
    saved = load_file(finished.path / "policies" / "step-4.safetensors")
    name = next(iter(saved))
    for change, message in (
        ({"elsewhere": saved[name].clone()}, "elsewhere is not in both"),
        ({name: saved[name][:9].clone()}, r"has shape \[9\] there, \[64\] here"),
        ({name: torch.full_like(saved[name], torch.nan)}, "is not finite"),
    ):
        save_file(saved | change, tmp_path / "step-4.safetensors")
        with pytest.raises(ValueError, match=message):
            snapshots.load(model, tmp_path / "step-4.safetensors")
    (tmp_path / "step-4.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="is corrupted"):
        snapshots.load(model, tmp_path / "step-4.safetensors")


# --- the frontier ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(finished, tmp_path_factory) -> Path:
    """An evaluation with snapshots and limits."""
    path = tmp_path_factory.mktemp("frontier")
    evaluate(finished.path, path, "snapshots=true", "base_samples=12")
    return path


def test_the_frontier_has_every_policy_on_the_same_prompts(finished, measured, tmp_path):
    summary = Run(measured).read_summary()
    points = summary["frontier"]
    assert [point["step"] for point in points] == [4, 8, 12]
    last = points[-1]
    assert (last["reward"], last["kl"], last["kl_exact"]) == (
        summary["reward_after"],
        summary["kl"],
        summary["kl_exact"],
    )
    assert last["gain"] == pytest.approx(summary["reward_after"] - summary["reward_base"])
    base = [np.mean(line["rewards"]) for line in lines(measured / "base.jsonl")]
    assert summary["reward_base"] == pytest.approx(np.mean(base)), "12 samples a prompt instead of one"
    assert last["nll_heldout"] == summary["nll_heldout_after"] and summary["trainable_parameters"] == 128
    assert 0 < points[0]["delta_norm"] < last["delta_norm"] and last["nonzero"] > 0
    assert [p["delta_norm"] for p in points] == pytest.approx(
        [row["delta_norm"] for row in lines(finished.path / "metrics.jsonl")]
    )
    assert all(point["kl_exact"] > 0 and point["kl_exact_se"] > 0 for point in points)
    plain = evaluate(finished.path, tmp_path / "plain")
    assert plain["reward_base"] == plain["reward_before"] == summary["reward_before"]
    assert plain["kl"] == summary["kl"] and len(plain["frontier"]) == 1 and "optimum" not in plain
    assert not (tmp_path / "plain" / "base.jsonl").exists()


def test_what_was_learned_can_be_weakened(finished, measured, tmp_path):
    summary = evaluate(finished.path, tmp_path / "a", "factors=[0.5,1e-6]", f"base={measured}")
    faint, half, last = summary["frontier"]
    assert [p.get("factor") for p in (faint, half, last)] == [1e-6, 0.5, None]
    assert abs(faint["kl_exact"]) < 1e-6 < half["kl_exact"] < last["kl_exact"]
    assert half["delta_norm"] == pytest.approx(0.5 * last["delta_norm"]) and half["nonzero"] == last["nonzero"]
    assert last == Run(measured).read_summary()["frontier"][-1], "the policy itself is as without factors"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora", "ia3", "steering_vector", "bias_only", "neuron_basis"])
def test_weakened_to_nothing_every_policy_is_its_reference(saes, tmp_path, kind):
    words = ["adapter.sites=[mlp_out.1]"] if kind == "steering_vector" else []
    run = do(tmp_path / "run", settings(None, f"adapter.kind={kind}", "adapter.lr=3e-2", *words))
    summary = evaluate(run.path, tmp_path / "measured", "factors=[1e-7]", "base_samples=0")
    faint, last = summary["frontier"]
    assert faint["kl_exact"] < 1e-6 < last["kl_exact"]
    assert faint["nll_heldout"] == pytest.approx(summary["nll_heldout_before"], abs=1e-5)


def test_the_frontier_comes_with_its_limits(measured):
    from saerl_cli.analysis.frontier import best_of_n, kl_optimum

    summary, base = Run(measured).read_summary(), lines(measured / "base.jsonl")
    rewards = np.array([line["rewards"] for line in base])
    assert rewards.shape == (16, 12) and summary["base_samples"] == 12 and len({line["prompt"] for line in base}) == 16
    assert summary["best_of_n"] == best_of_n(rewards)
    limit = kl_optimum(rewards)
    assert [row["gain"] for row in summary["optimum"]] == [limit.at(row["kl"]).gain for row in summary["optimum"]]
    for point in summary["frontier"]:
        best = limit.at(point["kl_exact"])
        if point["efficiency"] is not None:
            assert best.reliable and point["efficiency"] == pytest.approx(point["gain"] / best.gain)
    assert summary["efficiency"] == summary["frontier"][-1]["efficiency"]
    for name in ("frontier.svg", "frontier.png", "frontier.csv"):
        assert (measured / name).stat().st_size > 0
    drawn = (measured / "frontier.csv").read_text().splitlines()
    assert sum(row.startswith("sparse_coeffs,") for row in drawn) == 3


def test_base_samples_are_drawn_once(finished, measured, tmp_path, monkeypatch):
    from saerl_cli.rl.evaluation import base

    monkeypatch.setattr(base, "draw_base", lambda *_: pytest.fail("drawn again"))
    again = evaluate(finished.path, tmp_path / "again", f"base={measured}")
    assert again["best_of_n"] == Run(measured).read_summary()["best_of_n"] and again["base_samples"] == 12
    assert (tmp_path / "again" / "base.jsonl").read_bytes() == (measured / "base.jsonl").read_bytes()
    assert again["optimum"] and again["efficiency"] == Run(measured).read_summary()["efficiency"]


def test_what_cannot_be_measured_is_refused(finished, measured, saes, tmp_path):
    with pytest.raises(ValueError, match="base=.* has no base.jsonl; give a run of"):
        evaluate(finished.path, tmp_path / "out", f"base={finished.path}")
    with pytest.raises(ValueError, match="was drawn with another seed than"):
        evaluate(finished.path, tmp_path / "out", f"base={measured}", "seed=9")
    with pytest.raises(ValueError, match="base_samples does nothing with base; leave one of them out"):
        evaluate(finished.path, tmp_path / "out", f"base={measured}", "base_samples=9")
    with pytest.raises(ValueError, match="base_samples must be 0 or >= 2"):
        evaluate(finished.path, tmp_path / "out", "base_samples=1")
    shutil.copytree(finished.path, tmp_path / "other")
    record = json.loads((tmp_path / "other" / "run.json").read_text())
    record["inputs"]["model"]["sha256"] = "0" * 64
    (tmp_path / "other" / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="was drawn with another model than"):
        evaluate(tmp_path / "other", tmp_path / "out", f"base={measured}")
    shutil.rmtree(tmp_path / "other" / "policies")
    with pytest.raises(ValueError, match="kept no policies along the way; leave snapshots=true out, or"):
        evaluate(tmp_path / "other", tmp_path / "out", "snapshots=true")
