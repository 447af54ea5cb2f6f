"""Sweeps with every launcher that needs no cluster: tables, failed points, resuming. About 4 s a point with workers."""

import csv
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from commands import TRUE_STUB, stub
from conftest import ROOT, TINY_WORDS

from saerl_cli.config.groups import LaunchConfig
from saerl_cli.run import cluster, launch
from saerl_cli.run.directory import Run
from saerl_cli.run.files import read_json, read_jsonl, write_json

pytestmark = pytest.mark.usefixtures("empty_place")


def table(out: str) -> list[list[str]]:
    """The lines of the printed table, a list of cells each (no cell here is empty or holds blanks)."""
    return [line.split() for line in out[out.index("point ") :].splitlines()]


def rows(folder: str) -> list[dict[str, str]]:
    return read_csv(Path(folder, "sweep.csv"))


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open() as lines:
        return list(csv.DictReader(lines))


# --- the record ------------------------------------------------------------------------------------------------------


def test_a_sweep_ends_with_a_table_of_what_varies():
    done = stub("stub_here", "-m", "steps=1,2", "seed=0,1", "rank=3", "hydra.sweep.dir=out")
    assert done.returncode == 0, done.stderr
    assert table(done.stdout) == [
        ["point", "steps", "seed", "status", "objective", "steps", "folder"],
        ["0", "1", "0", "completed", "1", "1", "out/0"],
        ["1", "1", "1", "completed", "1", "1", "out/1"],
        ["2", "2", "0", "completed", "2", "2", "out/2"],
        ["3", "2", "1", "completed", "2", "2", "out/3"],
    ]
    assert Path("out/sweep.csv").read_text().splitlines()[4] == "3,2,1,completed,2.0,2,out/3,"
    record = read_json(Path("out/sweep.json"))
    assert record["command"] == "saerl stub-here -m steps=1,2 seed=0,1 rank=3 hydra.sweep.dir=out"
    assert record["points"][3]["overrides"] == ["steps=2", "seed=1", "rank=3"]


def test_runs_shows_a_sweep_as_its_points_stand_now(saerl):
    assert stub("stub_here", "-m", "steps=1,2", "hydra.sweep.dir=out").returncode == 0
    facts = Run.load("out/1").record | {"status": "failed", "error": "no luck", "command": "saerl again"}
    write_json(Path("out/1/run.json"), facts)
    shown = saerl("runs", "out")
    assert table(shown.stdout)[2][:3] == ["1", "2", "failed"]
    assert "no luck; resume: saerl again" in shown.stdout
    assert [row["status"] for row in rows("out")] == ["completed", "failed"]
    assert saerl("runs").stdout == "no runs in runs\n"  # runs/.conf alone
    assert "completed    stub_here" in saerl("runs", ".").stdout  # above a sweep, its runs


# --- failed points and resuming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_failed_points_are_named_and_only_they_are_done_again(launcher):
    words = ("stub_here", "-m", "steps=1,2", f"hydra/launcher={launcher}", "hydra.sweep.dir=out")
    first = stub(*words, SAERL_TEST_FAIL="steps=1")
    assert first.returncode == 1
    assert first.stderr.splitlines()[-1] == (
        "saerl: 1 of 2 points are not complete: 0 (failed: no luck);"
        f" continue with: saerl stub-here -m steps=1,2 hydra/launcher={launcher} hydra.sweep.dir=out"
    )
    assert "Traceback" not in first.stderr
    assert [row["status"] for row in rows("out")] == ["failed", "completed"]
    assert rows("out")[0]["error"] == "no luck"
    untouched = Path("out/1/run.json").read_bytes()
    second = stub(*words)
    assert second.returncode == 0, second.stderr
    assert "1 of 2 points are complete already" in second.stderr
    assert [row["status"] for row in rows("out")] == ["completed", "completed"]
    assert Path("out/1/run.json").read_bytes() == untouched


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
def test_a_failed_point_with_workers_resumes_from_its_checkpoint(launcher):
    words = ("stub", "-m", "end=value_error,good", f"hydra/launcher={launcher}", "hydra.sweep.dir=out")
    first = stub(*words)
    assert first.returncode == 1
    assert "0 (failed: the data are used up); continue with" in first.stderr.splitlines()[-1]
    assert "Traceback" not in first.stderr
    assert stub(*words).returncode == 0
    assert [line["total"] for line in read_jsonl(Path("out/0/metrics.jsonl"))] == [1.0, 2.0, 3.0, 4.0]
    third = stub(*words)
    assert (third.returncode, third.stderr) == (0, "2 of 2 points are complete already\n")


def test_failures_do_not_end_a_sweep_that_runs_in_batches():
    words = ("stub_here", "-m", "steps=1,2,3", "hydra.sweep.dir=out", "hydra.sweeper.max_batch_size=1")
    done = stub(*words, SAERL_TEST_FAIL="steps=2")
    assert done.returncode == 1
    assert [row["status"] for row in rows("out")] == ["completed", "failed", "completed"]


def hanging(*words: str, done: tuple[int, ...] = ()) -> "subprocess.Popen[str]":
    """A sweep of steps=1,2,3 that hangs in its second point; returned once that has begun and others are done."""
    env = os.environ | {"SAERL_TEST_HANG": "steps=2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = subprocess.Popen([*TRUE_STUB, *words], text=True, env=env, start_new_session=True, **pipes)  # type: ignore[call-overload]
    deadline = time.monotonic() + 120
    while not (Path("out/1/run.json").is_file() and all(Run(f"out/{i}").status == "completed" for i in done)):
        assert time.monotonic() < deadline, "the second point did not start"
        time.sleep(0.05)
    return command


THREE = ("stub_here", "-m", "steps=1,2,3", "hydra.sweep.dir=out")


def test_a_killed_sweep_does_the_rest():
    with hanging(*THREE) as command:
        command.kill()
    assert [Run(f"out/{i}").status for i in range(3)] == ["completed", "running", None]
    earlier = Path("out/0/run.json").read_bytes()
    done = stub(*THREE)
    assert done.returncode == 0, done.stderr
    assert Path("out/0/run.json").read_bytes() == earlier
    assert len(Run.load("out/1").record["resumed"]) == 1
    assert Run.load("out/2").record["resumed"] == []
    assert [row["status"] for row in rows("out")] == ["completed"] * 3
    assert done.stderr.splitlines() == ["1 of 3 points are complete already", "done: out/1", "done: out/2"]


@pytest.mark.parametrize(
    "launcher, number, everybody",
    [
        ("basic", signal.SIGINT, False),
        ("joblib", signal.SIGINT, True),
        ("submitit_local", signal.SIGINT, True),
        *(
            pytest.param(launcher, number, everybody, marks=pytest.mark.slow)
            for launcher, number, everybody in (
                ("basic", signal.SIGTERM, False),
                ("basic", signal.SIGINT, True),
                ("joblib", signal.SIGTERM, False),
                ("submitit_local", signal.SIGTERM, False),
                ("submitit_local", signal.SIGINT, False),
            )
        ),
    ],
)
def test_an_interrupted_sweep_says_how_to_go_on(launcher, number, everybody):
    """`everybody`: as ctrl-C on a terminal, which all processes of the command get."""
    words = (*THREE, f"hydra/launcher={launcher}")
    with hanging(*words, done=(0,) if launcher == "basic" else (0, 2)) as command:
        below = psutil.Process(command.pid).children(recursive=True)
        time.sleep(0.5)  # into the point's work
        os.killpg(command.pid, number) if everybody else command.send_signal(number)
        out, err = command.communicate(timeout=60)
    assert command.returncode == 1
    assert "Traceback" not in err and "interrupted" not in "".join(err.splitlines()[:-1]), err
    left = "2 of 3 points are not complete: 1 (interrupted), 2 (not started)"
    if launcher != "basic":
        left = "1 of 3 points are not complete: 1 (interrupted)"
    assert err.splitlines()[-1] == (
        f"saerl: interrupted: {left};"
        f" continue with: saerl stub-here -m steps=1,2,3 hydra/launcher={launcher} hydra.sweep.dir=out"
    )
    assert ["1", "2", "interrupted"] in [row[:3] for row in table(out)]
    assert not Path("out/1/.lock").exists()
    assert Path("out/2").exists() == (launcher != "basic")
    _, alive = psutil.wait_procs(below, timeout=10)
    assert not alive


def test_a_sweep_that_is_interrupted_before_its_first_point_leaves_nothing(monkeypatch, capfd):
    from stub_command import register

    from saerl_cli.run import bridge
    from saerl_cli.run.sweep import OnlyMissing

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    register()
    monkeypatch.setattr(OnlyMissing, "launch", interrupted)
    monkeypatch.setattr("saerl_cli.run.sweep.end_children", lambda: None)  # this process has others: the fork server
    with pytest.raises(SystemExit) as end:
        bridge.run("stub_here", ["-m", "steps=1,2", "hydra.sweep.dir=some/where"])
    assert (end.value.code, capfd.readouterr().err) == (1, "saerl: interrupted\n")
    assert not Path("some").exists()


def test_two_sweeps_in_one_directory_are_refused():
    assert stub("stub_here", "-m", "steps=1,2", "hydra.sweep.dir=out").returncode == 0
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    for words in (["steps=1,3"], ["steps=2,1"], ["steps=choice(3,4)"]):
        refused = stub("stub_here", "-m", *words, "hydra.sweep.dir=out")
        assert refused.returncode == 2
        assert "two sweeps in one directory; write another hydra.sweep.dir" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    another = stub("stub", "-m", "steps=1,2", "hydra.sweep.dir=out")
    assert (another.returncode, "out is a sweep of saerl stub-here: two sweeps in" in another.stderr) == (2, True)
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == before
    more = stub("stub_here", "-m", "steps=1,2,3", "hydra.sweep.dir=out")  # a longer one is the same, continued
    assert more.returncode == 0, more.stderr
    assert "2 of 3 points are complete already" in more.stderr


def everything(folder: str) -> dict[Path, bytes]:
    """All files below a folder."""
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_point_that_is_noted_and_not_begun_keeps_its_settings():
    assert stub("stub_here", "-m", "steps=1,2", "hydra.sweep.dir=out").returncode == 0
    shutil.rmtree("out/1")
    before = everything("out")
    refused = stub("stub_here", "-m", "steps=1,7", "hydra.sweep.dir=out")
    assert (refused.returncode, refused.stderr) == (
        2,
        "saerl: out/1 is noted with other settings (steps=2, now 7): two sweeps in one directory; write another"
        " hydra.sweep.dir\n",
    )
    shutil.rmtree("out/0")
    another = stub("stub", "-m", "steps=1,2", "hydra.sweep.dir=out")
    assert (another.returncode, "out is a sweep of saerl stub-here: two sweeps in" in another.stderr) == (2, True)
    assert everything("out") == {path: text for path, text in before.items() if path.parts[1] != "0"}
    same = stub("stub_here", "-m", "seed=0", "steps=range(1,3)", "hydra.sweep.dir=out")  # said otherwise
    assert same.returncode == 0, same.stderr
    assert [row["status"] for row in rows("out")] == ["completed"] * 2


def test_a_sweep_that_chooses_its_points_is_held_to_those_it_noted(monkeypatch, capfd):
    from stub_command import register

    from saerl_cli.run import bridge, preflight

    assert stub("stub_here", "-m", "steps=1,2", "hydra.sweep.dir=out").returncode == 0
    shutil.rmtree("out/1")
    record = Path("out/sweep.json").read_bytes()
    register()
    monkeypatch.setattr(preflight, "is_plain", lambda sweeper: False)  # then the checks foresee no folders
    with pytest.raises(SystemExit) as end:
        bridge.run("stub_here", ["-m", "steps=1,7", "hydra.sweep.dir=out"])
    assert end.value.code == 2
    assert "out/1 is noted with other settings (steps=2, now 7)" in capfd.readouterr().err
    assert Path("out/sweep.json").read_bytes() == record and not Path("out/1").exists()


def test_a_shorter_repeat_leaves_the_record_alone():
    words = ("stub_here", "-m", "hydra.sweep.dir=out")
    first = stub(*words, "steps=1,2,3", SAERL_TEST_FAIL="steps=3")
    assert first.returncode == 1
    record = read_json(Path("out/sweep.json"))
    again = stub(*words, "steps=1")
    assert (again.returncode, again.stderr) == (0, "out/0 is complete already\n")
    assert read_json(Path("out/sweep.json")) == record
    longer = stub(*words, "steps=1,2,3,4")
    assert longer.returncode == 0, longer.stderr
    assert read_json(Path("out/sweep.json"))["command"] == "saerl stub-here -m steps=1,2,3,4 hydra.sweep.dir=out"


def test_a_sweep_s_directory_is_no_run_s_and_a_run_s_no_sweep_s():
    assert stub("stub_here", "-m", "steps=1,2", "hydra.sweep.dir=sw").returncode == 0
    assert stub("stub_here", "hydra.run.dir=run").returncode == 0
    before = everything(".")
    single = stub("stub_here", "hydra.run.dir=sw")
    assert (single.returncode, single.stderr) == (
        2,
        "saerl: sw is a sweep (saerl stub-here -m steps=1,2 hydra.sweep.dir=sw); take another hydra.run.dir\n",
    )
    sweep = stub("stub_here", "-m", "steps=1,2", "hydra.sweep.dir=run")
    assert (sweep.returncode, sweep.stderr) == (
        2,
        "saerl: run is the directory of a run; write another hydra.sweep.dir\n",
    )
    assert everything(".") == before
    point = stub("stub_here", "steps=2", "hydra.run.dir=sw/1")  # as a point's own record says
    assert (point.returncode, "sw/1 is complete already" in point.stderr) == (0, True)


# --- side by side ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_points_side_by_side_share_the_cores(monkeypatch):
    """The launchers get told; stub jobs report the threads that torch has."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    for launcher in ("joblib", "submitit_local"):
        done = stub("stub", "-m", "seed=0,1", f"hydra/launcher={launcher}", f"hydra.sweep.dir={launcher}")
        assert done.returncode == 0, done.stderr
        threads = [Run.load(f"{launcher}/{i}").read_summary()["threads"] for i in range(2)]
        assert threads == [max(1, launch.cores() // 2)] * 2


def test_cores_are_shared_between_the_processes_of_all_points(monkeypatch):
    from saerl_cli.run.sweep import sharing_cores, side_by_side

    class JoblibLauncher:
        joblib = {"n_jobs": 8}  # noqa: RUF012

    monkeypatch.setattr(launch, "cores", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS")
    launcher = JoblibLauncher()
    assert side_by_side(launcher, 3) == launcher.joblib["n_jobs"] == 3
    launcher.joblib["n_jobs"] = -2
    assert side_by_side(launcher, 30) == 11
    assert side_by_side(object(), 3) == 1
    with sharing_cores(3, 2):
        assert os.environ["OMP_NUM_THREADS"] == "2"
        assert launch.environment(LaunchConfig(num_processes=2, cpu=True))["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in os.environ
    with sharing_cores(1, 2):  # one after the other, or on a cluster, whose nodes have other cores
        assert "OMP_NUM_THREADS" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    with sharing_cores(6, 1):
        assert os.environ["OMP_NUM_THREADS"] == "5"


def test_a_slurm_job_has_the_cores_that_it_was_given(monkeypatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert launch.cores() == 1


# --- a search --------------------------------------------------------------------------------------------------------


SEARCH = ("stub_here", "-m", "hydra/sweeper=optuna_kl", "hydra.sweeper.params=null", "hydra.sweep.dir=out")


@pytest.mark.slow
def test_a_search_maximises_and_goes_on_where_it_ended():
    first = stub(*SEARCH, "steps=range(1,9)", "hydra.sweeper.n_trials=3")
    assert first.returncode == 0, first.stderr
    best = max(float(row["objective"]) for row in rows("out"))
    assert f"best_value: {best}" in Path("out/optimization_results.yaml").read_text()
    records = [Path(f"out/{i}/run.json").read_bytes() for i in range(3)]
    more = stub(*SEARCH, "steps=range(1,9)", "hydra.sweeper.n_trials=5")
    assert more.returncode == 0, more.stderr
    assert [Path(f"out/{i}/run.json").read_bytes() for i in range(3)] == records
    assert [row["point"] for row in rows("out")] == ["0", "1", "2", "3", "4"]
    assert "out/2 is complete already" in more.stderr
    another = stub(*SEARCH, "steps=range(1,5)")
    assert another.returncode == 2
    assert another.stderr.splitlines()[-1].endswith("two sweeps in one directory; write another hydra.sweep.dir")


def test_the_search_within_a_kl_composes_and_may_be_changed(saerl):
    shown = saerl("rlhf", "--cfg", "hydra", "-p", "hydra.sweeper", "hydra/sweeper=optuna_kl").stdout
    for line in ("direction: maximize", "seed: 0", "adapter.lr: tag(log, interval(0.001, 0.3))"):
        assert line in shown
    refused = saerl("rlhf", "hydra/sweeper=optuna_kl")
    assert (refused.returncode, "has no effect without -m" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    "kl, limit, objective",
    [
        (3.0, None, 0.5),  # no limit
        (1.9, 2.0, 0.5),
        (2.0, 2.0, 0.5),
        (2.5, 2.0, -1.5),  # worse than the untouched model (-1) by the excess
        (9.0, 2.0, -8.0),
    ],
)
def test_over_the_limit_a_run_counts_as_worse_than_doing_nothing(kl, limit, objective):
    from saerl_cli.rl.outcome import objective as found

    assert found({"reward_before": -1.0, "reward_after": 0.5, "kl_exact": kl}, limit) == objective


def test_over_the_limit_losing_reward_is_worse_still():
    from saerl_cli.rl.outcome import objective

    assert objective({"reward_before": -1.0, "reward_after": -4.0, "kl_exact": 3.0}, 2.0) == -5.0


# --- clusters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    """An sbatch and an sinfo that prints what it is told."""

    def make(**commands: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, text in ({"sbatch": "exit 1"} | commands).items():
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")

    return make


SINFO = "echo 'cpu*|8|16000|(null)|2:00:00'; echo 'gpu|64|512000|gpu:a100:4(S:0-1)|7-00:00:00'"


@pytest.mark.parametrize(
    "sinfo, words, says",
    [
        ("echo 'sinfo: error: no controller' >&2; exit 1", [], "Slurm does not answer (sinfo: error: no controller)"),
        (SINFO, ["partition=c"], "this cluster has no partition c; there are cpu, gpu"),
        (SINFO, ["tasks_per_node=2"], "would start 2 copies of every run"),
        (SINFO, ["timeout_min=121"], "timeout_min=121, but partition cpu gives a job at most 120"),
        (SINFO, ["timeout_min=9", "cpus_per_task=9"], "cpus_per_task=9, but partition cpu gives a job at most 8"),
        (SINFO, ["timeout_min=9", "gpus_per_node=1"], "gpus_per_node=1, but partition cpu gives a job at most 0"),
        (SINFO, ["partition='cpu,gpu'", "gpus_per_node=5"], "partition cpu or gpu gives a job at most 4"),
        (SINFO, ["gpus_per_node=1 launch.num_processes=4"], "write hydra.launcher.gpus_per_node=4"),
    ],
)
def test_what_a_cluster_cannot_do_is_refused_before_it_is_asked(fake_slurm, sinfo, words, says):
    fake_slurm(sinfo=sinfo)
    words = " ".join(f"hydra.launcher.{word}" for word in words).split()
    refused = stub("stub", "-m", "hydra/launcher=slurm", *words, "hydra.sweep.dir=out")
    assert refused.returncode == 2
    assert says in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert not Path("out").exists()


def test_what_sinfo_says_of_a_node():
    node = cluster.as_node("gpu|64|512000|lustre:1,gpu:a100:4(S:0-1),gpu:2|7-01:30:00")
    assert node == cluster.Node("gpu", False, 64, 500.0, 6, 7 * 1440 + 90)
    assert cluster.as_node("cpu*|2|1024|(null)|infinite") == cluster.Node("cpu", True, 2, 1.0, 0, float("inf"))
    assert cluster.minutes("30:00") == 30


def test_points_whose_jobs_are_queued_are_not_submitted_again(fake_slurm):
    fake_slurm(sinfo="echo 'cpu*|8|16000|(null)|1-00:00:00'", squeue="echo 12_1; echo 99_0")
    for name in ("12_0", "12_1", "12"):
        Path("out/.submitit", name).mkdir(parents=True)
    refused = stub("stub", "-m", "hydra/launcher=slurm", "seed=0,1", "hydra.sweep.dir=out")
    assert refused.returncode == 2
    assert refused.stderr.splitlines() == [
        "saerl: jobs 12_1 of this sweep are still queued or running; wait for them (saerl runs out), or scancel them"
    ]


def test_a_machine_without_slurm_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    cluster.nodes.cache_clear()
    with pytest.raises(ValueError, match="there is no sbatch on this machine; submit from a machine of the cluster"):
        cluster.nodes()


@pytest.mark.parametrize("launcher, gpus", [("slurm", "null"), ("slurm_gpu", "1")])
def test_the_presets_compose_without_a_cluster(saerl, launcher, gpus):
    shown = saerl("rlhf", f"hydra/launcher={launcher}", "--cfg", "hydra", "-p", "hydra.launcher").stdout.splitlines()
    for line in ("max_num_timeout: 3", "signal_delay_s: 120", "  requeue: true", f"gpus_per_node: {gpus}"):
        assert line in shown


@pytest.mark.parametrize(
    "word, plugin, says",
    [
        ("hydra/launcher=slurm", "submitit_slurm", "pip install 'saerl[slurm]'"),
        ("hydra/launcher=joblib", "joblib", "pip install 'saerl[joblib]'"),
        ("hydra/sweeper=optuna_kl", "optuna", "pip install 'saerl[optuna]'"),
        ("hydra/launcher=ray", None, "hydra/launcher=ray is not one of saerl's extras"),
    ],
)
def test_a_plugin_that_is_not_installed_names_its_extra(monkeypatch, word, plugin, says):
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins
    from hydra.errors import HydraException

    from saerl_cli.config.rlhf import RlhfConfig
    from saerl_cli.run.configs import register_schema
    from saerl_cli.run.refusals import readable

    Plugins.instance()  # which fills the store
    register_schema("rlhf")
    group = ConfigStore.instance().repo["hydra"][word.split("/")[1].split("=")[0]]
    if plugin is not None:
        monkeypatch.delitem(group, f"{plugin}.yaml")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"), pytest.raises(HydraException) as error:
        compose("rlhf", [word], return_hydra_config=True)
    assert says in readable(error.value, "rlhf", RlhfConfig)


# --- real jobs -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_of_a_real_job_its_evaluations_comparison_and_report(saerl):
    small = [*TINY_WORDS, "algo.phases=2", "algo.rollouts=32", "evaluation.samples=32", "checkpoint_every=1"]
    swept = saerl("rlhf", "-m", "adapter=full,lora", "hydra/launcher=joblib", *small, "hydra.sweep.dir=rl")
    assert swept.returncode == 0, swept.stderr
    assert table(swept.stdout)[0][:4] == ["point", "adapter", "status", "objective"]
    assert [row["adapter"] for row in rows("rl")] == ["full", "lora"]
    assert float(rows("rl")[0]["objective"]) == Run.load("rl/0").read_summary()["reward_after"]
    finals = saerl("compare", "rl", "hydra.run.dir=finals")
    assert finals.returncode == 0, finals.stderr
    assert "final policies only, as training measured them, all on the same held-out prompts" in finals.stderr
    gains = {row["method"]: float(row["gain"]) for row in read_csv(Path("finals/costs.csv"))}
    end = {row["adapter"]: Run.load(row["folder"]).read_summary() for row in rows("rl")}
    assert gains == {name: pytest.approx(n["reward_after"] - n["reward_before"]) for name, n in end.items()}
    measured = saerl("evaluate", "-m", "policy=rl/0,rl/1", "evaluation.samples=32", "hydra.sweep.dir=ev")
    assert measured.returncode == 0, measured.stderr
    compared = saerl("compare", "ev", "hydra.run.dir=cmp")
    assert compared.returncode == 0, compared.stderr
    assert {row["method"].split()[0] for row in read_csv(Path("cmp/table.csv"))} == {"full", "lora"}
    for folder in ("rl", "ev"):
        reported = saerl("report", folder)
        assert reported.returncode == 0, reported.stderr
        assert "lora" in Path(folder, "report.html").read_text()
