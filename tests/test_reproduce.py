"""`saerl reproduce`: plans, verdicts, refusals, and Snakemake at work on small commands."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from commands import TRUE
from conftest import ROOT
from hydra import compose, initialize_config_dir

from saerl_cli.config import typed
from saerl_cli.config.pipeline import ExpectConfig, PipelineConfig, StageConfig, load_pipeline
from saerl_cli.reproduce import devices, engine, places, verdict
from saerl_cli.reproduce.expected import expected_seconds
from saerl_cli.run import cluster, lock
from saerl_cli.run.configs import conf_dir, register_schema
from saerl_cli.run.files import write_json
from saerl_cli.run.jobs import JOBS, resolve
from saerl_cli.run.pipeline import Task, known_pipelines, tasks_of
from saerl_cli.run.words import expand_sites, split_words

PIPELINES = known_pipelines()
GIVEN = {"model": "/models/mine", "data": "/texts/mine.jsonl"} | dict.fromkeys(("text", "pairs", "prompts"), "FILE")


def pipeline_of(**stages: dict) -> PipelineConfig:
    """A pipeline of these stages."""
    return PipelineConfig("mine", {name: StageConfig(**stage) for name, stage in stages.items()})


def tasks_by_name(pipeline: PipelineConfig, **options) -> dict[str, Task]:
    """Its tasks."""
    return {task.name: task for task in tasks_of(pipeline, Path("/out"), {}, **options)}


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_stage_runs_for_every_combination_and_references_follow_the_values():
    pipeline = pipeline_of(
        saes={"command": "train-sae", "words": ["seed=${seed}"], "each": {"seed": [0, 1]}},
        runs={
            "command": "rlhf",
            "words": ["seed=${seed}"],
            "each": {"seed": [0, 1], "method": {"full": ["adapter=full"], "mlp": ["adapter.saes=${saes}"]}},
        },
        evaluation={"command": "evaluate", "words": ["policy=${runs}"], "each": "runs"},
        comparison={"command": "compare", "words": ["runs=${evaluation}"]},
        table={"command": "report", "words": ["${runs:method=mlp}"], "each": {"seed": [1]}},
    )
    tasks = tasks_by_name(pipeline)
    assert len(tasks) == 2 + 4 + 4 + 1 + 1
    mlp = tasks["runs/1-mlp"]
    assert mlp.words[:3] == ["rlhf", "seed=1", "adapter.saes=/out/saes/1"]
    assert mlp.needs == ["saes/1"]
    assert tasks["runs/1-full"].needs == []
    assert tasks["evaluation/0-full"].words[1] == "policy=/out/runs/0-full"
    four = [f"/out/evaluation/{s}-{m}" for s in (0, 1) for m in ("full", "mlp")]
    assert tasks["comparison"].words[1] == f"runs=[{','.join(four)}]"
    assert tasks["comparison"].words[-1] == "hydra.run.dir=/out/comparison"
    assert tasks["table/1"].words == ["report", "/out/runs/1-mlp", "--out", "/out/table/1/report.html"]
    names = list(tasks)
    assert all(names.index(need) < names.index(task.name) for task in tasks.values() for need in task.needs)


def test_references_in_a_list_that_is_written_out_are_spliced():
    pipeline = pipeline_of(
        a={"command": "evaluate", "each": {"seed": [0, 1]}},
        b={"command": "evaluate"},
        c={"command": "compare", "words": ["runs=[${a},${b}]"]},
    )
    assert tasks_by_name(pipeline)["c"].words[1] == "runs=[/out/a/0,/out/a/1,/out/b]"


def test_paths_that_hydra_would_misread_are_quoted():
    pipeline = pipeline_of(a={"command": "rlhf"}, b={"command": "evaluate", "words": ["policy=${a}"]})
    tasks = {task.name: task for task in tasks_of(pipeline, Path('/my "runs", new'), {})}
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        register_schema("evaluate")
        cfg = compose("evaluate", tasks["b"].words[1:])
    assert cfg.policy == '/my "runs", new/a'


def test_the_small_scale_keeps_the_chosen_values_and_replaces_words():
    pipeline = pipeline_of(
        runs={"command": "rlhf", "words": ["algo.phases=40", "snapshots=4"], "each": {"seed": [0, 1, 2], "kl": [1, 2]}}
    )
    pipeline.small.each, pipeline.small.words = {"seed": [1]}, {"runs": ["snapshots=1"]}
    tasks = tasks_by_name(pipeline, small=True)
    assert list(tasks) == ["runs/1-1", "runs/1-2"]
    words = tasks["runs/1-1"].words
    assert "algo.phases=2" in words and "algo.phases=40" not in words
    assert [word for word in words if word.startswith("snapshots")] == ["snapshots=1"]
    assert "algo.phases=40" in tasks_by_name(pipeline)["runs/0-1"].words


@pytest.mark.parametrize(
    "stages, message",
    [
        ({"a": {"command": "rlhf", "words": ["x=${nothing}"]}}, r"stage a: \${nothing} is no value, variable or stage"),
        (
            {"a": {"command": "rlhf", "each": {"seed": [0]}}, "b": {"command": "evaluate", "words": ["${a:seed=7}"]}},
            "stands for no run of stage a",
        ),
        (
            {"a": {"command": "rlhf", "words": ["${b}"]}, "b": {"command": "rlhf", "words": ["${a}"]}},
            "stages need each other: a, b",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        tasks_of(pipeline_of(**stages), Path("/out"), {})


@pytest.mark.parametrize(
    "text, message",
    [
        ("stages: [1]", "must be a mapping with `stages`"),
        ("stages: {a: {command: rlhf, foo: 1}}", "stage a: there is no key foo; there are command, words"),
        ("stages: {a: {words: []}}", "stage a: missing 1 required positional argument: 'command'"),
        ("stages: {a: {command: rlhf, needs: [b]}}", "stage a: there is no stage b; there are a"),
        ("stages: {a: {command: rlhf}}\nsmall: {each: {seed: [0]}}", "small.each: no stage has seed"),
        ("stages: {a: [", "is not YAML"),
    ],
)
def test_a_pipeline_with_a_mistake_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as refused:
        load_pipeline(tmp_path / "mine.yaml")
    assert "\n" not in str(refused.value) and "mine.yaml" in str(refused.value)


def test_expected_time_is_that_of_the_schedule():
    """Two cores: a (10 s, both), then b and c side by side (20 s, 5 s), d after c (10 s) beside b."""
    stages = {
        "a": {"command": "rlhf", "threads": 2, "seconds": 10},
        "b": {"command": "rlhf", "needs": ["a"], "seconds": 20},
        "c": {"command": "rlhf", "needs": ["a"], "seconds": 5},
        "d": {"command": "rlhf", "needs": ["c"], "seconds": 10},
    }
    tasks = list(tasks_by_name(pipeline_of(**stages)).values())
    assert expected_seconds(tasks, 2) == 30
    assert expected_seconds(tasks, 1) == 45
    assert expected_seconds([*tasks, *tasks_by_name(pipeline_of(e={"command": "rlhf"})).values()], 2) is None


# --- the shipped pipelines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_every_stage_of_every_pipeline_composes(name):
    """One run of each stage and each value that brings words with it; the small ones run in test_reproduce_small."""
    seen = set()
    for task in tasks_of(load_pipeline(PIPELINES[name]), Path("/out"), GIVEN):
        each = task.config.each if isinstance(task.config.each, dict) else {}
        kind = (task.stage, *(task.values[key] for key, values in each.items() if isinstance(values, dict)))
        job = task.words[0].replace("-", "_")
        if kind in seen or job not in JOBS:
            continue
        seen.add(kind)
        sugar = ["adapter=sparse_coeffs"] * ("--sparse-coeffs" in task.words)
        _, overrides = split_words([*sugar, *(word for word in task.words[1:] if word != "--sparse-coeffs")])
        register_schema(job)
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            typed(compose(job, expand_sites(overrides, conf_dir(), False)), resolve(JOBS[job].schema))
    assert seen


@pytest.mark.parametrize("name", PIPELINES)
def test_what_a_pipeline_expects_is_in_its_card_with_a_reason(name):
    pipeline = load_pipeline(PIPELINES[name])
    assert pipeline.question
    assert pipeline.card == name
    if not pipeline.expect:
        assert verdict.load_record(pipeline) is None
        return
    record = verdict.load_record(pipeline)
    assert record is not None
    assert pipeline.why
    shipped = f'"experiments/{name}/results.json" = "saerl_cli/records/{name}.json"'
    assert shipped in (ROOT / "pyproject.toml").read_text()


# --- the verdict -----------------------------------------------------------------------------------------------------


def judged(
    got: list[float], recorded: list[float], floor: float | dict = 0.1, tmp: Path | None = None
) -> verdict.Check:
    """One metric of seeds 0, 1, ... here and in the record."""
    assert tmp is not None
    pipeline = pipeline_of(runs={"command": "rlhf", "each": {"seed": list(range(len(got)))}})
    pipeline.expect = [ExpectConfig("runs", "all", {"seed": "${seed}"}, {"reward": floor})]
    tasks = tasks_of(pipeline, tmp, {})
    for task, value in zip(tasks, got, strict=True):
        task.folder.mkdir(parents=True)
        write_json(task.folder / "summary.json", {"reward": value})
    record = {"runs": [{"seed": seed, "reward": value} for seed, value in enumerate(recorded)]}
    (check,) = verdict.compare(pipeline, tasks, record)
    return check


def test_the_tolerance_is_two_half_intervals(tmp_path):
    """Of 1, 2, 3 the mean is 2 and half its 95 % t-interval 4.3027 * 1 / sqrt(3)."""
    check = judged([2.0, 3.0, 7.0], [1.0, 2.0, 3.0], tmp=tmp_path)
    assert (check.recorded, check.got, check.difference) == (2.0, 4.0, 2.0)
    assert check.half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-4)
    assert check.tolerance == pytest.approx(2 * 4.30265 / math.sqrt(3), rel=1e-4)
    assert check.ok


def test_a_small_interval_by_luck_has_the_floor(tmp_path):
    assert judged([1.09, 1.09], [1.0, 1.0], tmp=tmp_path / "near").ok
    far = judged([1.11, 1.11], [1.0, 1.0], tmp=tmp_path / "far")
    assert far.tolerance == 0.1
    assert not far.ok


def test_a_metric_may_have_a_tolerance_of_its_own(tmp_path):
    check = judged([1.2, 3.0], [1.0, 3.0], floor={"floor": 0.05, "intervals": 0}, tmp=tmp_path)
    assert (check.tolerance, check.ok) == (0.05, False)
    assert check.difference == pytest.approx(0.1)


def test_rows_of_a_table_are_matched_by_their_keys_and_what_was_not_recorded_is_left_out(tmp_path):
    pipeline = pipeline_of(comparison={"command": "compare"})
    pipeline.card = "mine"
    match = {"method": "${method}", "kl": "${kl}"}
    pipeline.expect = [
        ExpectConfig("comparison", "${method} at ${kl}", match, {"gain": 0.1}, "table", record="comparison.table")
    ]
    (task,) = tasks_of(pipeline, tmp_path, {})
    task.folder.mkdir()
    rows = [("full", 0.3, 0.5), ("full", 0.6, None), ("lora", 0.3, 0.9), ("new", 0.3, 0.1)]
    write_json(task.folder / "summary.json", {"table": [{"method": m, "kl": k, "gain": g} for m, k, g in rows]})
    recorded = [("full", 0.30, 0.52, 0.01), ("full", 0.6, 0.8, 0.2), ("lora", 0.3, None, None)]
    table = [{"method": m, "kl": k, "gain": g, "gain_half": h} for m, k, g, h in recorded]
    checks = verdict.compare(pipeline, [task], {"comparison": {"table": table}})
    assert [(check.label, check.ok) for check in checks] == [("full at 0.3", True), ("full at 0.6", False)]
    assert checks[0].tolerance == 0.1
    assert checks[1].tolerance == 0.4
    assert checks[1].got is None


def test_results_without_a_seed_are_held_against_all_recorded_seeds_once(tmp_path):
    pipeline = pipeline_of(evaluation={"command": "eval-sae"})
    only = {"name": "*/wrong"}
    pipeline.expect = [ExpectConfig("evaluation", "wrong", {"name": "wrong"}, {"loss": 0.0}, "controls", only)]
    (task,) = tasks_of(pipeline, tmp_path, {})
    task.folder.mkdir()
    rows = {"a/wrong": {"loss": 1.0}, "b/wrong": {"loss": 3.0}, "b/random": {"loss": 9.0}}
    write_json(task.folder / "summary.json", {"controls": rows})
    record = {"runs": [{"name": "wrong", "loss": x} for x in (1.0, 2.0, 3.0)] + [{"name": "random", "loss": 7.0}]}
    (check,) = verdict.compare(pipeline, [task], record)
    assert (check.got, check.recorded) == (2.0, 2.0)
    assert check.half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-4)


def test_drift_is_the_mean_over_rows_in_tolerances():
    def check(metric, difference):
        return verdict.Check(metric, "row", 1.0, None, 1.0 + difference, 0.5)

    found = verdict.drifts([check("gain", 0.4), check("gain", 0.2), check("kl", 0.4), check("kl", -0.4), check("n", 1)])
    assert found == {"gain": pytest.approx(0.6), "kl": pytest.approx(0.0)}


def test_a_record_of_another_version_is_named():
    mine = {"commit": verdict.git_state()["git_commit"], "versions": verdict.versions()}
    assert verdict.other_versions(mine) == []
    other = {"commit": ["0123456789", "abc"], "versions": mine["versions"] | {"trl": "0.9.0"}}
    changed, commit = verdict.other_versions(other)
    assert "trl 0.9.0 (here " in changed
    assert "commit 0123456, abc, this is commit" in commit


def test_a_record_without_the_metric_is_refused(tmp_path, monkeypatch):
    pipeline = pipeline_of(runs={"command": "rlhf"})
    pipeline.card = "mine"
    pipeline.expect = [ExpectConfig("runs", "all", {}, {"reward": 0.1})]
    monkeypatch.setattr(verdict, "record_file", lambda card: tmp_path / "results.json")
    with pytest.raises(ValueError, match="results.json is missing"):
        verdict.load_record(pipeline)
    (tmp_path / "results.json").write_text(json.dumps({"commit": "0123456789", "runs": [{"rewards": 1}]}))
    with pytest.raises(ValueError, match="another version: runs has no reward; .* commit 0123456"):
        verdict.load_record(pipeline)
    (tmp_path / "results.json").write_text(json.dumps({"commit": "0123456789", "rows": []}))
    with pytest.raises(ValueError, match="another version: it has no runs"):
        verdict.load_record(pipeline)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (["01-demo"], "there is no experiment 01-demo; did you mean 001-demo? There are 001-demo, 002-stories"),
        (["nothing.yaml"], "nothing.yaml: No such file"),
        (["002-stories", "model=x"], "002-stories needs model=MODEL data=DATA: DATA is a jsonl file"),
        (["001-demo", "model=x"], "model=x is no variable of 001-demo; there are: none"),
        (["001-demo", "--scale", "big"], "--scale must be full or small, got big"),
        (["001-demo", "--on", "moon"], "--on must be local or slurm, got moon"),
        (["001-demo", "--jobs", "0"], "--jobs must be >= 1, got 0"),
        (["001-demo", "--out", "file"], "file: File exists; take another --out"),
        (["002-stories", "model=x", "data=file"], "model=x: there is no such folder; model is a folder with neox"),
        (["002-stories", "model=file", "data=file", "--dry-run"], "model=file: there is no such folder"),
        (["002-stories", "model=.", "data=x", "--dry-run"], "data=x: there is no such file; data is a jsonl file with"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(saerl, empty_place, words, message):
    Path("file").write_text("")
    done = saerl("reproduce", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("saerl: ") and len(done.stderr.splitlines()) == 1
    assert message in done.stderr
    assert [path.name for path in Path().iterdir()] == ["file"]


AT_SCALE = ["reproduce", "020-pythia-at-scale", "text=file", "pairs=file", "prompts=file"]


def test_stages_that_need_a_gpu_are_refused_where_there_is_none(saerl, empty_place):
    pytest.importorskip("snakemake")
    Path("file").write_text("")
    refused = saerl(*AT_SCALE, CUDA_VISIBLE_DEVICES="")
    assert (refused.returncode, refused.stderr) == (
        2,
        "saerl: stage saes/70m needs 1 GPU, and this machine has none; take --on slurm, or --scale small, which shows"
        " that every stage runs without any\n",
    )
    shown = saerl(*AT_SCALE, "--dry-run", CUDA_VISIBLE_DEVICES="")
    assert shown.returncode == 0, shown.stderr
    assert [path.name for path in Path().iterdir()] == ["file"]


def test_the_small_scale_needs_no_gpu_no_memory_and_no_files_that_it_does_not_read(tmp_path):
    pipeline = load_pipeline(PIPELINES["020-pythia-at-scale"])
    given = dict.fromkeys(("text", "pairs", "prompts"), "unused")
    tasks = [places.brought_down(task) for task in tasks_of(pipeline, tmp_path, given, small=True)]
    assert {task.config.gpus for task in tasks} == {0}
    assert max(places.host_gb(task) for task in tasks) <= places.SMALL_GB
    places.refuse_missing(pipeline, given, tasks)
    with pytest.raises(ValueError, match="text=unused: there is no such file"):
        places.refuse_missing(pipeline, given, tasks_of(pipeline, tmp_path, given))


def test_slurm_is_asked_for_memory_in_which_the_weights_fit(tmp_path):
    """6.9 billion parameters in float32 are 27.6 GB; Snakemake would ask for 1 GB where nothing is stated."""
    given = dict.fromkeys(("text", "pairs", "prompts"), "FILE")
    tasks = tasks_of(load_pipeline(PIPELINES["020-pythia-at-scale"]), tmp_path, given)
    plan = engine.plan_of(tasks, tmp_path, {}, "slurm", longest=720)
    asked = {rule["task"]: rule for rule in plan["tasks"]}
    assert {rule["mem_mb"] for name, rule in asked.items() if "6.9b" in name} == {80_000}
    assert asked["evaluation/70m-0.001-0"]["mem_mb"] == 8_000
    assert asked["saes/6.9b"]["runtime"] == 720, "the day that is asked for where time is unknown, or what there is"
    (unstated,) = tasks_of(pipeline_of(a={"command": "rlhf", "gpus": 1, "memory_gb": 67}), tmp_path, {})
    assert places.host_gb(unstated) == 67
    half = pipeline_of(a={"command": "rlhf", "each": {"size": ["70m", "1b"]}, "host_gb": {"size": {"70m": 8}}})
    with pytest.raises(ValueError, match="stage a/1b: host_gb says nothing of size=1b"):
        engine.plan_of(tasks_of(half, tmp_path, {}), tmp_path, {})
    assert not asked["saes/6.9b"]["command"].startswith("env CUDA") and "devices" not in asked["saes/6.9b"]["command"]


NODES = [
    cluster.Node("cpu", True, 8, 16.0, 0, 120.0),
    cluster.Node("gpu", False, 16, 64.0, 4, 1e9),
    cluster.Node("big", False, 64, 512.0, 0, 1e9),
]


@pytest.mark.parametrize(
    "profile, stage, says",
    [
        ("", {"gpus": 1}, "stage a needs 1 GPUs, but partition cpu gives a job at most 0; name another partition in a"),
        ("", {"threads": 9}, "stage a needs 9 CPU cores, but partition cpu gives a job at most 8"),
        ("", {"memory_gb": 17}, "stage a needs 17 GB of memory, but partition cpu gives a job at most 16"),
        ("", {"seconds": 3600}, "stage a needs 240 minutes, but partition cpu gives a job at most 120"),
        ("mine", {"gpus": 5}, "but partition big or cpu or gpu gives a job at most 4"),
        ("mine", {"gpus": 1, "host_gb": 100}, "needs 1 CPU cores, 1 GPUs, 100 GB of memory, but no node of partition"),
        ("mine", {"gpus": 4, "host_gb": 64}, None),
        ("", {"threads": 8}, None),
    ],
)
def test_what_the_cluster_does_not_have_is_refused(tmp_path, monkeypatch, profile, stage, says):
    monkeypatch.setattr(cluster, "nodes", lambda *_: tuple(NODES))
    monkeypatch.delenv("SNAKEMAKE_PROFILE", raising=False)
    if profile:
        monkeypatch.setenv("SNAKEMAKE_PROFILE", profile)
    tasks = tasks_of(pipeline_of(a={"command": "rlhf", **stage}), tmp_path, {})
    minutes = {task.name: engine.expected_limit(task) for task in tasks}
    if says is None:
        assert places.refuse_too_small_cluster(tasks, minutes) == (1e9 if profile else 120.0)
        return
    with pytest.raises(ValueError) as refused:
        places.refuse_too_small_cluster(tasks, minutes)
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "sinfo, says",
    [
        (
            None,
            "--on slurm: there is no sbatch on this machine; start the command on a machine of the cluster, or take",
        ),
        ("echo 'sinfo: error: no controller' >&2; exit 1", "Slurm does not answer (sinfo: error: no controller);"),
        ("echo 'cpu*|8|500|(null)|2:00:00'", "GB of memory, but partition cpu gives a job at most 0.48828"),
    ],
)
def test_a_cluster_that_is_not_there_or_too_small_is_refused(saerl, empty_place, tmp_path_factory, sinfo, says):
    pytest.importorskip("snakemake_executor_plugin_slurm")
    commands = tmp_path_factory.mktemp("bin")
    for name in ("sbatch", "sinfo") if sinfo else ():
        (commands / name).write_text(f"#!/bin/sh\n{sinfo}\n")
        (commands / name).chmod(0o755)
    refused = saerl("reproduce", "001-demo", "--on", "slurm", PATH=str(commands))  # this machine may have a Slurm
    assert refused.returncode == 2
    assert says in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert not list(Path().iterdir())


def test_without_snakemake_the_extra_is_named_and_a_dry_run_works(empty_place):
    Path("hide").mkdir()
    Path("hide/sitecustomize.py").write_text(
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'snakemake' else find(name, *a)\n"
    )
    path = os.pathsep.join(["hide", os.environ["PYTHONPATH"]])

    def saerl(*words):  # of the environment above, hence no fork
        return subprocess.run([*TRUE, *words], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})

    refused = saerl("reproduce", "001-demo")
    assert refused.returncode == 2
    assert "pip install 'saerl[reproduce]'" in refused.stderr
    assert not Path("runs").exists()
    shown = saerl("reproduce", "001-demo", "--dry-run")
    assert shown.returncode == 0, shown.stderr


def test_a_dry_run_shows_commands_time_and_memory_and_writes_nothing(saerl, empty_place):
    shown = saerl("reproduce", "001-demo", "--dry-run", "--jobs", "2")
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    command = next(line for line in lines if line.startswith("saerl evaluate"))
    assert shlex.split(command)[1:4] == ["evaluate", "policy=runs/reproduce/001-demo/runs/0-sparse_coeffs", "seed=1"]
    assert "19 of 19 stages to run, 2 cores: about " in lines[-1]
    assert "GB" in lines[-1]
    assert not list(Path().iterdir())


def test_what_a_card_does_not_state_is_planned_with_the_saes_that_an_earlier_stage_makes(monkeypatch):
    """Each plan is made once, whatever the seed; what cannot be planned stays unknown."""
    from saerl_cli.plan import command as planning
    from saerl_cli.reproduce.expected import costs_of, expected_seconds

    monkeypatch.setattr("saerl_cli.run.launch.gpus", lambda: 0)
    asked = []
    true = planning.plan
    monkeypatch.setattr(planning, "plan", lambda *words: (asked.append(words), true(*words))[1])
    coefficients = ["--sparse-coeffs", "adapter.saes=${saes}", "seed=${seed}", "algo.phases=3"]
    tasks = tasks_of(
        pipeline_of(
            saes={"command": "train-sae", "words": ["sae.expansion=4", "site=mlp_out.2"], "seconds": 7, "gpus": 1},
            fit={"command": "rlhf", "words": [*coefficients, "algo=rwr"], "each": {"seed": [0, 1]}, "gpus": 1},
            quality={"command": "eval-sae", "words": ["saes=${saes}"], "gpus": 1, "memory_gb": 3},
            audit={"command": "audit", "words": ["policy=${fit:seed=0}"]},
        ),
        Path("/out"),
        {},
    )
    costs = costs_of(tasks)
    assert (costs["saes"].seconds, costs["saes"].memory_gb, costs["saes"].planned_for) == (7, 1.0, "")
    assert costs["fit/0"] == costs["fit/1"] and costs["fit/0"].planned_for == "a100-80gb"
    assert [words[0] for words in asked] == ["rlhf", "eval-sae"]
    assert all(words[4] == ["sae.expansion=4", "site=mlp_out.2", "launch.threads=1"] for words in asked)
    found = true("rlhf", ["adapter=sparse_coeffs", "adapter.saes=no", "algo.phases=3", "algo=rwr"], *asked[0][2:])
    assert costs["fit/0"].seconds == pytest.approx(found["seconds"])
    assert costs["fit/0"].memory_gb == pytest.approx(found["peak_bytes"] / 1e9)
    assert costs["quality"].seconds and costs["quality"].memory_gb == 3
    assert costs["audit"].seconds is None and expected_seconds(tasks, 2, costs) is None
    assert expected_seconds(tasks[:-1], 2, costs)


def test_a_folder_with_other_settings_is_refused(tmp_path):
    tasks = list(tasks_by_name(pipeline_of(a={"command": "rlhf", "words": ["seed=1"]})).values())
    plan = engine.plan_of(tasks, tmp_path, {})
    engine.save_plan(tmp_path, plan)
    engine.refuse_other_plan(tmp_path, plan)
    plan["tasks"][0]["words"][1] = "seed=2"
    with pytest.raises(ValueError, match=r"begun with other stages or settings \(a\)"):
        engine.refuse_other_plan(tmp_path, plan)


# --- Snakemake at work -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShellTask(Task):
    """A task that runs a line of shell instead of saerl."""

    line: str = "true"

    @property
    def command(self) -> list[str]:
        return ["sh", "-c", self.line]


def shell_tasks(out: Path, **lines: tuple[str, list[str]]) -> list[ShellTask]:
    """Tasks by name: line and needs."""
    return [
        ShellTask(name, name, out / name, [line], needs, {}, StageConfig("rlhf"), line)
        for name, (line, needs) in lines.items()
    ]


def run_in(out: Path, tasks: list[ShellTask]) -> engine.Outcome:
    """Run tasks as `saerl reproduce` does."""
    out.mkdir(exist_ok=True)
    lock.acquire(out)
    try:
        engine.save_plan(out, engine.plan_of(tasks, out, {}))
        return engine.run_tasks(tasks, out, 2, "local")
    finally:
        lock.release(out)


def names(tasks: list[Task]) -> list[str]:
    return sorted(task.name for task in tasks)


def test_the_others_go_on_past_a_failure_and_only_what_is_missing_is_done_again(tmp_path, capsys):
    pytest.importorskip("snakemake")
    note = f"echo x >> {tmp_path}"
    lines = {
        "good": (f"{note}/good; echo '{{[k]}}'", []),
        "bad": (f"{note}/bad; echo 'saerl: no luck'; test -e {tmp_path}/luck", []),
        "after_good": (f"test -e {tmp_path}/good && {note}/after_good", ["good"]),
        "after_bad": (f"{note}/after_bad", ["bad"]),
    }
    tasks = shell_tasks(tmp_path / "out", **lines)
    first = run_in(tmp_path / "out", tasks)
    assert (names(first.finished), names(first.failed), names(first.waiting)) == (
        ["after_good", "good"],
        ["bad"],
        ["after_bad"],
    )
    said = capsys.readouterr().err
    assert "FAILED bad after" in said and "finished good after" in said
    assert engine.last_line(engine.log_of(tasks[1], tmp_path / "out")) == "no luck"
    assert engine.log_of(tasks[0], tmp_path / "out").read_text() == "{[k]}\n"
    (tmp_path / "luck").touch()
    second = run_in(tmp_path / "out", tasks)
    assert names(second.finished) == ["after_bad", "after_good", "bad", "good"]
    done = {name: (tmp_path / name).read_text().count("x") for name in lines}
    assert done == {"good": 1, "bad": 2, "after_good": 1, "after_bad": 1}
    assert "2 of 4 stages are finished already" in capsys.readouterr().err


def test_stages_with_a_gpu_run_side_by_side_each_on_its_own(tmp_path, monkeypatch):
    """Each of two waits until both have begun; a third, without a GPU, sees none."""
    pytest.importorskip("snakemake")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    monkeypatch.setattr(devices, "folder", lambda: tmp_path / "locks")
    both = f"touch {tmp_path}/$NAME; until test -e {tmp_path}/a && test -e {tmp_path}/b; do sleep 0.1; done"
    tell = 'echo "[$CUDA_VISIBLE_DEVICES]"'
    lines = {name: (f"NAME={name}; {both}; {tell}", []) for name in "ab"} | {"c": (tell, [])}
    tasks = [
        replace(task, config=replace(task.config, gpus=int(task.name != "c")))
        for task in shell_tasks(tmp_path / "out", **lines)
    ]
    outcome = run_in(tmp_path / "out", tasks)
    assert names(outcome.finished) == ["a", "b", "c"]
    seen = [engine.log_of(task, tmp_path / "out").read_text().strip() for task in tasks]
    assert sorted(seen[:2]) == ["[5]", "[GPU-7]"] and seen[2] == "[]"


def test_a_gpu_is_given_back_however_its_stage_ends(tmp_path):
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "3,4", "PYTHONPATH": str(ROOT)}

    def stage(count: int, line: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "saerl_cli.reproduce.devices", str(count), str(tmp_path), "sh", "-c", line]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

    with stage(1, 'echo "$CUDA_VISIBLE_DEVICES"; exec sleep 600') as first:
        assert first.stdout is not None and first.stdout.readline() == "3\n"
        with stage(2, 'echo "$CUDA_VISIBLE_DEVICES"') as both:
            assert both.stderr is not None and "waiting for 2 GPUs" in both.stderr.readline()
            with stage(1, 'echo "$CUDA_VISIBLE_DEVICES"') as other:
                assert other.communicate(timeout=30)[0] == "4\n", "what cannot have all holds none of them"
            first.kill()
            assert both.communicate(timeout=30)[0] == "3,4\n"
    with stage(3, "true") as many:
        said = many.communicate(timeout=30)[1]
    assert (many.returncode, said) == (1, "saerl: the stage needs 3 GPUs, but this machine has 2\n")


@pytest.mark.slow
def test_two_at_once_are_refused_and_an_interrupted_one_goes_on(saerl, empty_place):
    Path("mine.yaml").write_text(
        "stages: {runs: {command: rlhf, words: [reward=cursing], each: {seed: {0: [seed=0]}}}}\n"
        "small: {words: {runs: [algo.phases=40]}}\n"
    )
    words = ["reproduce", "mine.yaml", "--scale", "small", "--out", "out"]
    command = [sys.executable, "-m", "saerl_cli.cli", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as one:
        deadline = time.monotonic() + 120
        while not Path("out/runs/0/metrics.jsonl").is_file() and time.monotonic() < deadline:
            time.sleep(0.2)
        two = saerl(*words)
        assert two.returncode == 2
        assert f"out is in use by process {one.pid}" in two.stderr and "take another --out" in two.stderr
        one.send_signal(signal.SIGINT)
        said = one.communicate(timeout=120)[1]
    assert one.returncode == 1
    assert "interrupted; repeat this command to go on" in said
    assert json.loads(Path("out/runs/0/run.json").read_text())["status"] == "interrupted"
    again = saerl(*words)
    assert again.returncode == 0, again.stderr
    assert json.loads(Path("out/runs/0/run.json").read_text())["resumed"]
