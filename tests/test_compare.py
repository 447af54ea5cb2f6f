"""`saerl compare`: methods and seeds from evaluations written by hand, and the real commands on a tiny model."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import test_rl_job
from omegaconf import OmegaConf
from test_rl_job import do, settings

from saerl_cli.analysis.compare import (
    Method,
    common_kls,
    costs,
    mean_curve,
    methods_of,
    rounded_down,
    row,
)
from saerl_cli.analysis.evaluations import choose
from saerl_cli.analysis.frontier import kl_optimum
from saerl_cli.config import flat
from saerl_cli.config.compare import CompareConfig
from saerl_cli.jobs import compare
from saerl_cli.run.directory import Run

saes = test_rl_job.saes  # a fixture

MEASURED = {"model": "ab", "reference": "model", "reward": {}, "samples": 64, "seed": 1, "prompts": "cd"}


def evaluation(folder: Path, adapter: str, seed: int, slope: float, reach: float = 2.0, **more) -> Path:
    """A finished evaluation whose gain is `slope` times the KL, measured at half and all of its reach."""
    folder.mkdir(parents=True)
    frontier = [
        {
            "step": step,
            "kl_exact": kl,
            "kl_exact_se": 0.01,
            "reward": slope * kl - 1,
            "reward_se": 0.1,
            "gain": slope * kl,
            "gain_se": 0.05,
            **({"nonzero": 20 + seed, "changed": 10 + seed} if adapter != "full" else {}),
        }
        for step, kl in ((1, reach / 2), (2, reach))
    ]
    measured = MEASURED | more.pop("measured", {})
    summary = {"adapter": adapter, "reward_base": -1.0, "trainable_parameters": 64, "frontier": frontier}
    record = {"job": "evaluate", "status": more.pop("status", "completed"), "command": "saerl evaluate ..."}
    trained = {"adapter.kind": adapter, "adapter.lr": 0.1, "seed": seed, "launch.threads": seed, **more}
    (folder / "run.json").write_text(json.dumps(record | {"trained_with": trained}))
    (folder / "summary.json").write_text(json.dumps(summary | {"measured": measured}))
    return folder


@pytest.fixture
def runs(tmp_path) -> Path:
    """Three seeds of coefficients with slopes 1, 2, 3; two of full with slope 4, one of which stops early."""
    for seed in range(3):
        evaluation(tmp_path / "runs" / f"coeffs-{seed}", "sparse_coeffs", seed, seed + 1.0)
    evaluation(tmp_path / "runs" / "full-0", "full", 0, 4.0)
    evaluation(tmp_path / "runs" / "full-1", "full", 1, 4.0, reach=1.0)
    return tmp_path / "runs"


def methods(runs: Path, **config):
    config = CompareConfig(runs=str(runs), **config)
    return methods_of(choose(config.paths()).evaluations, config)


def test_runs_that_differ_in_their_seed_are_one_method(runs):
    coeffs, full = methods(runs)
    assert (coeffs.name, len(coeffs.runs), full.name, len(full.runs)) == ("sparse_coeffs", 3, "full", 2)
    evaluation(runs / "other", "sparse_coeffs", 0, 1.0, **{"adapter.lr": 0.5})
    assert [m.name for m in methods(runs)] == ["sparse_coeffs lr=0.1", "full", "sparse_coeffs lr=0.5"]
    assert [m.name for m in methods(runs, by=["adapter.kind"])] == ["sparse_coeffs", "full"]
    named = methods(runs, labels={"full": "all weights", "sparse_coeffs lr=0.5": "fast"})
    assert [m.name for m in named] == ["sparse_coeffs lr=0.1", "all weights", "fast"]


def test_runs_of_one_seed_that_differ_in_what_makes_no_method_are_one_frontier(tmp_path):
    for coef, slope, reach in ((0.2, 1.0, 2.0), (0.6, 3.0, 0.5)):
        evaluation(tmp_path / f"c{coef}", "sparse_coeffs", 0, slope, reach, **{"algo.kl_coef": coef})
    assert len(methods(tmp_path)) == 2
    (method,) = methods(tmp_path, by=["adapter.kind"])
    (run,) = method.runs
    assert sorted(point["kl"] for point in run.points) == [0.25, 0.5, 1.0, 2.0] and run.reach == 2.0
    at_half = row(method, 0.5, None, {})
    assert (at_half["gain"], at_half["runs"], at_half["reached"]) == (pytest.approx(1.5), 1, 1)
    assert row(method, 0.75, None, {})["gain"] == pytest.approx(1.5 + 0.5 / 6), "on the chord from 0.5 to 2"


def test_gains_at_equal_kl_by_hand(runs):
    coeffs, full = methods(runs)
    found = row(coeffs, 0.5, full, {})
    t2 = 4.302653
    assert (found["gain"], found["share"]) == (pytest.approx(1.0), pytest.approx(0.5))
    assert found["gain_half"] == pytest.approx(t2 * 0.5 / math.sqrt(3), rel=1e-6)
    t1 = 12.7062  # two runs of full leave one degree of freedom
    assert found["share_half"] == pytest.approx(t1 * 0.5 / math.sqrt(3) / 2, rel=1e-5)
    assert found["difference"] == pytest.approx(-1)
    assert found["difference_half"] == pytest.approx(t2 * 0.5 / math.sqrt(3)), "full does not vary: Welch has 2 degrees"
    assert row(full, 0.5, full, {})["share"] is None and found["efficiency"] is None
    curve = mean_curve(coeffs)
    for reach in np.random.default_rng(0).uniform(0.1, 5, size=20):
        rounded = [evaluation(runs / f"{reach}-{seed}", "full", seed, 1.0, float(reach)) for seed in (0, 1)]
        assert mean_curve(Method("full", choose([str(run) for run in rounded]).evaluations))[-1]["kl"] == reach
    assert curve[0]["gain"] == 0 and curve[-1]["kl"] == 2 and curve[-1]["gain"] == pytest.approx(4)


def test_a_kl_that_a_seed_does_not_reach_is_not_filled_in(runs):
    coeffs, full = methods(runs)
    beyond = row(full, 1.5, full, {})
    assert beyond["gain"] is None and beyond["share"] is None and (beyond["reached"], beyond["runs"]) == (1, 2)
    found = row(coeffs, 1.5, full, {})
    assert found["gain"] == pytest.approx(3) and found["share"] is None
    assert row(coeffs, 9.0, full, {})["reached"] == 0
    assert common_kls([coeffs, full]) == [0.25, 0.5, 1.0]
    assert (rounded_down(0.3789), rounded_down(123.0), rounded_down(1.0)) == (0.37, 120.0, 1.0)


def test_efficiency_is_the_mean_over_seeds(runs):
    limit = kl_optimum(np.random.default_rng(0).normal(size=(2000, 64)) * 4)
    coeffs, _ = methods(runs)
    found = row(coeffs, 0.5, None, {"": limit})
    best = limit.at(0.5).gain
    assert found["efficiency"] == pytest.approx(1 / best) and best == pytest.approx(4, rel=0.02)
    assert found["efficiency_half"] == pytest.approx(found["gain_half"] / best)


def test_across_models_every_run_has_its_own_limit_and_differences_are_paired(tmp_path):
    """Two languages in which everything gains 1 or 10 nats' worth: unpaired, the difference would drown."""
    for language, size in (("ab", 1.0), ("zz", 10.0)):
        for adapter, slope in (("sparse_coeffs", 1.0), ("full", 1.5)):
            more = {"measured": {"model": language, "prompts": language}, "model.planted.seed": size}
            evaluation(tmp_path / f"{adapter}-{language}", adapter, 0, slope * size, **more)
    with pytest.raises(ValueError, match=r"unless across=\[...\] names"):
        choose([str(tmp_path)])
    config = CompareConfig(runs=str(tmp_path), across=["model", "prompts"])
    full, coeffs = methods_of(choose(config.paths(), config.across).evaluations, config)
    assert [len(full.runs), len(coeffs.runs)] == [2, 2], "a language is another run of the method, not another method"
    rewards = np.random.default_rng(0).normal(size=(500, 64))
    limits = {run.group: kl_optimum(rewards * run.points[-1]["gain"]) for run in coeffs.runs}  # ten times as high in zz
    found = row(coeffs, 1.0, full, limits)
    own = [row(Method("one", [run]), 1.0, None, limits)["efficiency"] for run in coeffs.runs]
    assert own[0] == pytest.approx(own[1]) and found["efficiency"] == pytest.approx(own[0])
    assert found["efficiency_half"] == pytest.approx(0, abs=1e-9)
    assert found["difference"] == pytest.approx(-(0.5 + 5.0) / 2)
    half = 12.7062 * (5.0 - 0.5) / 2  # t quantile of one degree of freedom, times |x - y| / 2
    assert found["difference_half"] == pytest.approx(half, rel=1e-4)
    assert found["gain"] == pytest.approx(5.5)


def test_what_cannot_be_compared_is_refused_in_one_line(runs, tmp_path):
    def refusal(**config) -> str:
        with pytest.raises(ValueError) as caught:
            compare.check(CompareConfig(**{"runs": str(runs), **config}))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no folder" in refusal(runs=str(tmp_path / "nowhere"))
    assert "kls must be a list of KLs > 0" in refusal(kls=[0.0])
    assert "by: no run has a setting adapter.rank" in refusal(by=["adapter.rank"])
    assert "labels: there is no method 'lora'; there are sparse_coeffs, full" in refusal(labels={"lora": "x"})
    assert "baseline: there is no method 'lora'" in refusal(baseline="lora")
    assert "same method with the same seed" in refusal(
        runs=[str(runs), str(evaluation(tmp_path / "twice", "full", 0, 4.0))]
    )
    other = evaluation(tmp_path / "other", "full", 7, 4.0, measured={"model": "zz"})
    assert f"{other} was measured with another model than" in refusal(runs=[str(runs), str(other)])
    other = evaluation(tmp_path / "prompts", "full", 7, 4.0, measured={"prompts": "zz"})
    assert "was measured with other prompts than" in refusal(runs=[str(runs), str(other)])
    other = evaluation(tmp_path / "half", "full", 7, 4.0, status="interrupted")
    assert f"{other} is interrupted; finish it first: saerl evaluate" in refusal(runs=[str(runs), str(other)])
    (other / "run.json").write_text(json.dumps({"job": "rlhf", "status": "failed", "command": "saerl rlhf"}))
    assert f"only {other} (failed); finish it first: saerl rlhf" in refusal(runs=str(other))
    sweep = {"job": "rlhf", "command": "saerl rlhf -m seed=0,1", "points": []}
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    assert refusal(runs=str(other)).endswith("finish it first: saerl rlhf -m seed=0,1"), "of a point that of all"
    (other / "run.json").write_text(json.dumps({"job": "train_sae"}))
    assert "holds no run of `saerl evaluate` and none of `saerl rlhf`" in refusal(runs=str(other))


# --- final policies --------------------------------------------------------------------------------------------------


def trained(folder: Path, *words: str, gain: float = 1.0, kl: float = 2.0, status: str = "completed") -> Path:
    """A run of `saerl rlhf` as far as its settings and numbers go."""
    from hydra import compose, initialize_config_dir

    from saerl_cli.run.configs import conf_dir, register_schema

    register_schema("rlhf")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("rlhf", list(words))
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(config, folder / ".hydra" / "config.yaml")
    record = {"job": "rlhf", "status": status, "command": "saerl rlhf", "inputs": {"model": {"sha256": "ab"}}}
    numbers = {"reward_before": -1.0, "reward_before_se": 0.03, "reward_after": gain - 1, "reward_se": 0.04}
    numbers |= {"kl": kl, "kl_se": 0.1, "kl_exact": kl, "kl_exact_se": 0.01, "steps": 10, "seconds": 5.0}
    numbers |= {"adapter": config.adapter.kind, "trainable_parameters": 64, "peak_memory_bytes": 2**30}
    (folder / "run.json").write_text(json.dumps(record))
    if status == "completed":
        (folder / "summary.json").write_text(json.dumps(numbers))
    return folder


@pytest.fixture
def sweep(tmp_path) -> Path:
    """Full with two seeds, LoRA with one, and one that failed."""
    trained(tmp_path / "sw" / "0", "adapter=full", "seed=0", gain=1.0)
    trained(tmp_path / "sw" / "1", "adapter=full", "seed=1", gain=2.0)
    trained(tmp_path / "sw" / "2", "adapter=lora", "seed=0", gain=0.5, kl=1.0)
    trained(tmp_path / "sw" / "3", "adapter=lora", "seed=1", status="failed")
    return tmp_path / "sw"


def test_finished_policies_are_single_points_by_their_own_measurement(sweep, monkeypatch):
    monkeypatch.chdir(sweep.parent)
    chosen = choose(["sw"])
    full, lora = methods_of(chosen.evaluations, CompareConfig(runs="sw"))
    assert [len(full.runs), len(lora.runs)] == [2, 1]
    point = {"kl": 2.0, "gain": 1.0, "gain_se": pytest.approx(0.05)}
    assert full.runs[0].points == [point], "errors of both means, as if independent: hypot(0.03, 0.04)"
    assert row(full, 1.0, None, {})["gain"] == pytest.approx(0.75), "on the chord from the base model, both seeds"
    assert costs(full) == {"seconds": 5.0, "peak_memory_bytes": 2**30}
    assert chosen.note == (
        "final policies only, as training measured them, all on the same held-out prompts, each with its own seed:"
        " `saerl evaluate -m policy=sw/0,sw/1,sw/2 'factors=[0.25,0.5,0.75]' hydra.sweep.dir=sw-eval` gives the"
        " frontier"
    )
    assert chosen.left_out == ["left out, not finished: sw/3 (failed)"]
    for path in ("0", "1", "2"):
        Path("sw", path, "policies").mkdir()
        Path("sw", path, "policies", "step-2.safetensors").write_text("")
    assert "`saerl evaluate -m policy=sw/0,sw/1,sw/2 snapshots=true hydra.sweep.dir=sw-eval`" in choose(["sw"]).note


@pytest.mark.parametrize(
    "word, says",
    [
        ("prompts.tokens=4", "each on its own run's prompts"),
        ("evaluation.samples=64", "each on its own run's prompts"),
        ("algo.phases=3", "all on the same held-out prompts:"),
    ],
)
def test_the_note_says_whether_final_policies_share_prompts(tmp_path, word, says):
    trained(tmp_path / "sw" / "0")
    trained(tmp_path / "sw" / "1", word)
    assert says in choose([str(tmp_path / "sw")]).note


def test_final_policies_of_another_reward_are_refused(sweep):
    trained(sweep / "4", "reward=sentiment")
    with pytest.raises(ValueError, match=r"sw/4 was measured with another reward than .*sw/0"):
        choose([str(sweep)])


def test_evaluations_are_preferred_to_the_policies_they_measured(sweep, monkeypatch):
    monkeypatch.chdir(sweep.parent)
    path = evaluation(sweep / "eval", "full", 0, 1.0)
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | {"policy": "sw/0"}))
    chosen = choose(["sw"])
    assert [(e.path, e.final) for e in chosen.evaluations] == [(Path("sw/eval"), False)]
    assert chosen.note == "" and len(chosen.left_out) == 1
    assert chosen.left_out[0].startswith("left out, since nothing has evaluated them: sw/1, sw/2; `saerl evaluate -m")


def test_a_folder_without_evaluations_beside_one_with_them_is_mixed_and_says_so(sweep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = OmegaConf.to_container(OmegaConf.load("sw/0/.hydra/config.yaml"))
    own = choose(["sw/0"]).evaluations[0].measured
    path = evaluation(tmp_path / "ev", "full", 0, 1.0, measured=own | {"prompts": "fresh", "seed": 1})
    record = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(record | {"trained_with": flat(settings)}))
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | {"policy": "sw/0"}))
    chosen = choose(["ev", "sw"])
    assert [(str(e.path), e.final) for e in chosen.evaluations] == [("ev", False), ("sw/1", True), ("sw/2", True)]
    assert chosen.note.startswith(
        "sw/1, sw/2: final policies only, on other prompts and random numbers than the evaluations: `saerl evaluate -m"
    )


def test_the_command_compares_the_sweep_that_trained_the_policies(saerl, sweep):
    done = saerl("compare", "sw", "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    assert "final policy" in done.stdout.splitlines()[1]
    assert "final policies only, as training measured them" in done.stderr
    assert "left out, not finished: sw/3 (failed)" in done.stderr
    summary = Run(Path("out")).read_summary()
    assert (
        summary["note"].startswith("final policies only") and summary["methods"]["lora"]["measured"] == "final policy"
    )
    with Path("out", "table.csv").open() as file:
        assert {line["measured"] for line in csv.DictReader(file)} == {"final policy"}
    assert "lora (final policy)" in Path("out", "figure.csv").read_text()
    assert "final policies only" in Path("out", "figure.svg").read_text()
    reported = saerl("report", "out")
    assert reported.returncode == 0, reported.stderr
    assert "final policies only, as training measured them" in Path("out", "report.html").read_text()


@pytest.mark.parametrize("words", [["nowhere"], ["sw", "nowhere"], ["nowhere", "kls=[1]"]])
def test_a_mistyped_folder_is_named(saerl, sweep, words):
    refused = saerl("compare", *words)
    assert (refused.returncode, refused.stderr) == (2, "saerl: there is no folder nowhere\n")


# --- the commands ----------------------------------------------------------------------------------------------------


def test_the_command_writes_table_figure_and_numbers(saerl, runs):
    rewards = np.random.default_rng(0).normal(size=(50, 16)) * 4
    lines = [json.dumps({"prompt": str(i), "rewards": list(line)}) + "\n" for i, line in enumerate(rewards)]
    (runs / "full-0" / "base.jsonl").write_text("".join(lines))
    done = saerl("compare", f"runs={runs}/*", "kls=[0.5,1.5]", "labels={full: all weights}", "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    heading = "method seeds trainable moved KL, nats gain minus baseline p of baseline of optimum"
    assert " ".join(done.stdout.splitlines()[0].split()) == heading
    assert "not reached (1 of 2)" in done.stdout
    summary = Run(Path("out")).read_summary()
    coeffs, full = summary["table"][:2]
    assert (coeffs["method"], full["method"], coeffs["changed"], full["changed"]) == (
        "sparse_coeffs",
        "all weights",
        11,
        None,
    )
    assert coeffs["share"] == pytest.approx(0.5) and coeffs["efficiency"] == pytest.approx(0.25, rel=0.1)
    assert summary["best_of_n"][-1]["n"] == 16 and summary["baseline"] == "all weights"
    with Path("out", "table.csv").open() as file:
        assert [float(line["kl"]) for line in csv.DictReader(file)] == [0.5, 0.5, 1.5, 1.5]
    drawn = Path("out", "figure.csv").read_text()
    assert "optimum" in drawn and "sparse_coeffs (mean)" in drawn and Path("out", "figure.png").stat().st_size > 0
    with Path("out", "sparsity.csv").open() as file:
        assert {(line["method"], float(line["changed"])) for line in csv.DictReader(file)} == {
            ("sparse_coeffs", 10),
            ("sparse_coeffs", 11),
            ("sparse_coeffs", 12),
        }
    refused = saerl("compare", f"runs={runs}/nothing")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1


def test_what_training_cost_comes_from_its_own_run(tmp_path):
    for seed, seconds in ((0, 10.0), (1, 30.0)):
        path = evaluation(tmp_path / f"e{seed}", "full", seed, 1.0)
        trained = tmp_path / f"t{seed}"
        trained.mkdir()
        (trained / "summary.json").write_text(json.dumps({"seconds": seconds, "peak_memory_bytes": 2**30}))
        summary = json.loads((path / "summary.json").read_text())
        (path / "summary.json").write_text(json.dumps(summary | {"policy": str(trained)}))
    (method,) = methods(tmp_path)
    assert costs(method) == {"seconds": 20.0, "peak_memory_bytes": 2**30}
    (tmp_path / "t1" / "summary.json").unlink()
    assert costs(method) == {"seconds": None, "peak_memory_bytes": None}, "half of the seeds are no mean of all"


@pytest.mark.slow
def test_from_training_to_the_comparison(saerl, empty_place, saes):
    """Two seeds of coefficients and one of full, on one set of prompts, through the command line."""
    do(empty_place / "coeffs-0", settings(saes))
    do(empty_place / "coeffs-1", settings(saes, "seed=1"))
    do(empty_place / "full-0", settings(None, "snapshots=1"))
    words = ["evaluation.samples=24", "evaluation.heldout_tokens=500", "snapshots=true", "launch.cpu=true"]
    first = saerl("evaluate", "policy=coeffs-0", *words, "base_samples=8", "hydra.run.dir=measured/coeffs-0")
    assert first.returncode == 0, first.stderr
    assert "efficiency" in first.stdout and len(first.stdout.splitlines()) == 4
    for name in ("coeffs-1", "full-0"):
        done = saerl("evaluate", f"policy={name}", *words, "base=measured/coeffs-0", f"hydra.run.dir=measured/{name}")
        assert done.returncode == 0, done.stderr
    done = saerl("compare", "runs=measured", "kls=[0.0001,50]", "hydra.run.dir=compared")
    assert done.returncode == 0, done.stderr
    out = empty_place / "compared"
    summary = Run(out).read_summary()
    assert summary["methods"].keys() == {"sparse_coeffs", "full"} and summary["baseline"] == "full"
    assert summary["methods"]["sparse_coeffs"]["seeds"] == [0, 1] and summary["methods"]["full"]["nonzero"] is None
    with (out / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(line["method"], line["kl"]) for line in table] == [
        ("sparse_coeffs", "0.0001"),
        ("full", "0.0001"),
        ("sparse_coeffs", "50.0"),
        ("full", "50.0"),
    ]
    assert table[0]["gain"] and table[0]["trainable_parameters"] == "128" and not table[2]["gain"]
    assert done.stdout.count("not reached (0 of 2)") == 1 and "one seed of full" in done.stderr
    for name in ("figure.svg", "figure.png", "figure.csv"):
        assert (out / name).stat().st_size > 0
    finals = saerl("compare", "coeffs-0", "hydra.run.dir=finals")
    assert finals.returncode == 0, finals.stderr
    assert "`saerl evaluate policy=coeffs-0 snapshots=true` gives the frontier" in finals.stderr
    again = saerl("evaluate", "policy=full-0", "snapshots=true", "base=coeffs-0")
    assert again.returncode == 2 and len(again.stderr.splitlines()) == 1
