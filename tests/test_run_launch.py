"""Commands, workers and what happens when they end badly, with the job of stub_command.py. About 3 s a command."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import TINY_WORDS

from saerl_cli.config.groups import LaunchConfig
from saerl_cli.run import launch, lock, worker
from saerl_cli.run.directory import Run
from saerl_cli.run.files import read_json, read_jsonl, write_json

STUB = [sys.executable, str(Path(__file__).parent / "stub_command.py")]

pytestmark = pytest.mark.usefixtures("empty_place")


def stub(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*STUB, *words], capture_output=True, text=True, timeout=120, env=os.environ | env)


def metrics(folder: str) -> list[float]:
    return [line["total"] for line in read_jsonl(Path(folder, "metrics.jsonl"))]


# --- what this machine can do ----------------------------------------------------------------------------------------


def test_processes_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setattr(launch, "cores", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    launch.check_launch(LaunchConfig(num_processes=4, cpu=True))
    launch.check_launch(LaunchConfig(num_processes=2))
    with pytest.raises(ValueError, match="has 4 cores"):
        launch.check_launch(LaunchConfig(num_processes=5, cpu=True))
    with pytest.raises(ValueError, match="has 2 GPUs; write launch=cpu_2"):
        launch.check_launch(LaunchConfig(num_processes=3))
    launch.check_launch(LaunchConfig(num_processes=3), here=False)  # a cluster's nodes are not this machine
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="not under torchrun"):
        launch.check_launch(LaunchConfig())


@pytest.mark.parametrize("visible, count", [("", 0), ("-1", 0), ("0", 1), ("0,1", 2), ("GPU-8a,GPU-9b", 2)])
def test_gpus_are_counted_without_torch(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert launch.gpus() == count


def test_threads_are_asked_for_or_inherited_or_shared_out(monkeypatch):
    monkeypatch.setattr(launch, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert [e["OMP_NUM_THREADS"] for e in launch.environments(LaunchConfig(num_processes=2, cpu=True))] == ["4", "4"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert next(launch.environments(LaunchConfig()))["OMP_NUM_THREADS"] == "3"
    assert next(launch.environments(LaunchConfig(threads=5)))["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize("got, asked", [(1, 2), (2, 1)])
def test_a_wrong_world_size_is_an_error(got, asked):
    with pytest.raises(RuntimeError, match=f"num_processes={asked}, but {got}"):
        worker.check_world_size(got, asked)


# --- one process -----------------------------------------------------------------------------------------------------


def test_a_run_writes_its_directory_and_is_not_done_twice():
    first = stub("stub", "hydra.run.dir=out", "seed=1")
    assert first.returncode == 0, first.stderr
    assert first.stderr.splitlines() == ["counting: 0/4", "counting: 4/4 in 0 s", "done: out"]
    run = Run.load("out")
    assert (run.status, run.record["job"], run.record["result"], run.record["seed"]) == ("completed", "stub", 3.0, 1)
    assert run.record["command"] == "saerl stub seed=1 hydra.run.dir=out"
    assert run.record["device"] == "cpu"
    assert not Path("out/.lock").exists()
    assert metrics("out") == [1.0, 2.0, 3.0, 4.0]
    again = stub("stub", "hydra.run.dir=out", "seed=1", "launch.threads=1")  # threads may change
    assert again.returncode == 0
    assert again.stderr == "out is complete already: total 4, world 1, threads 1\n"
    other = stub("stub", "hydra.run.dir=out", "seed=2")
    assert other.returncode == 2
    assert "started with other settings (seed=1, now 2)" in other.stderr
    assert Run.load("out").record == run.record
    another_job = stub("stub_here", "hydra.run.dir=out", "seed=1")
    assert another_job.returncode == 2
    assert "is a run of saerl stub" in another_job.stderr


def test_a_failure_is_one_line_exit_1_and_resumes():
    words = ("stub", "hydra.run.dir=out", "end=value_error")
    failed = stub(*words)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[1:] == [
        "saerl: the data are used up; continue with: saerl stub end=value_error hydra.run.dir=out"
    ]
    assert Run.load("out").status == "failed"
    assert Run.load("out").record["error"] == "the data are used up"
    assert not Path("out/error.txt").exists()
    done = stub(*words)
    assert done.returncode == 0
    assert done.stderr.splitlines()[0] == "counting: 2/4"
    assert metrics("out") == [1.0, 2.0, 3.0, 4.0]
    assert len(Run.load("out").record["resumed"]) == 1


@pytest.mark.slow
def test_a_bug_leaves_its_traceback_in_the_run_directory():
    failed = stub("stub", "hydra.run.dir=out", "end=bug")
    assert failed.returncode == 1
    assert "saerl: KeyError: 'oops' (traceback in out/error.txt)" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert "misbehave" in Path("out/error.txt").read_text()
    assert "Traceback" in stub("stub", "hydra.run.dir=b", "end=bug", SAERL_TRACEBACK="1").stderr


@pytest.mark.slow
def test_a_number_that_is_not_finite_names_the_step():
    failed = stub("stub", "hydra.run.dir=out", "end=not_finite")
    assert failed.returncode == 1
    assert "saerl: step 3: metrics.jsonl: loss is nan" in failed.stderr


def test_work_without_workers():
    done = stub("stub_here", "hydra.run.dir=out")
    assert (done.returncode, Run.load("out").record["result"]) == (0, 4.0)


def test_a_sweep_has_a_directory_a_point():
    words = ("stub_here", "-m", "steps=1,2", "hydra.sweep.dir=out", "hydra.hydra_logging.root.level=ERROR")
    assert stub(*words).returncode == 0
    assert [Run.load(f"out/{i}").record["result"] for i in range(2)] == [1.0, 2.0]
    assert Run.load("out/1").record["command"] == "saerl stub-here steps=2 hydra.run.dir=out/1"
    assert [path.name for path in Path("runs/.conf").iterdir()] == [
        Path(read_hydra("out/0")["runtime"]["config_sources"][1]["path"]).name
    ]
    other = stub(*words[:2], "steps=1,3", *words[3:])
    assert other.returncode == 2
    assert "out/1 was started with other settings (steps=2, now 3)" in other.stderr


def test_a_directory_taken_after_the_checks_is_left_alone(monkeypatch):
    """What two sweeps that start together would meet."""
    from stub_command import register

    from saerl_cli.run import bridge

    def in_use(folder: Path) -> None:
        raise lock.InUse(f"{folder} is in use by process 1")

    register()
    monkeypatch.setattr(lock, "acquire", in_use)
    theirs = {"job": "stub_here", "status": "running"}
    Path("out/0").mkdir(parents=True)
    write_json(Path("out/0/run.json"), theirs)
    with pytest.raises(SystemExit) as end:
        bridge.run("stub_here", ["-m", "steps=1", "hydra.sweep.dir=out"])
    assert end.value.code == 1
    assert read_json(Path("out/0/run.json")) == theirs


def read_hydra(folder: str) -> dict:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(Path(folder, ".hydra/hydra.yaml")).hydra)  # type: ignore[return-value]


# --- stopped and killed ----------------------------------------------------------------------------------------------


def started(*words: str) -> subprocess.Popen[str]:
    """A command whose first step has been logged."""
    process = subprocess.Popen([*STUB, *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    for _ in until(60):
        if Path("out/metrics.jsonl").is_file():
            return process
    raise AssertionError("the command did not start its work")


def until(seconds: float) -> Iterator[None]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield
        time.sleep(0.05)


def workers(command: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(command.pid).children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a zombie has ended and only waits to be noticed."""
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


HANGS = ("stub", "hydra.run.dir=out", "end=hang")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_workers_and_says_how_to_continue(number):
    with started(*HANGS) as command:
        below = workers(command)
        command.send_signal(number)
        _, said = command.communicate(timeout=30)
    assert command.returncode == 1
    assert said.splitlines()[-1] == "saerl: interrupted; continue with: saerl stub end=hang hydra.run.dir=out"
    assert Run.load("out").status == "interrupted"
    assert not Path("out/.lock").exists()
    assert below
    assert not alive(below)
    assert not [path for path in Path("out").rglob("*partial*")]


def test_a_run_in_use_is_refused_and_a_killed_one_resumes():
    with started(*HANGS) as command:
        below = workers(command)
        refused = stub(*HANGS)
        assert refused.returncode == 2
        assert f"out is in use by process {command.pid}" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
        command.kill()
    assert Run.load("out").status == "running"  # nobody was left to say otherwise
    done = stub(*HANGS)  # at once: waits for the orphaned worker to end itself
    assert done.returncode == 0, done.stderr
    assert metrics("out") == [1.0, 2.0, 3.0, 4.0]
    assert not alive(below)


@pytest.mark.slow
def test_a_killed_worker_is_reported_and_the_run_resumes():
    words = ("stub", "hydra.run.dir=out", "end=kill")
    killed = stub(*words)
    assert killed.returncode == 1
    assert "saerl: the worker was killed by SIGKILL" in killed.stderr
    assert Run.load("out").status == "failed"
    assert stub(*words).returncode == 0
    assert metrics("out") == [1.0, 2.0, 3.0, 4.0]


# --- two processes ---------------------------------------------------------------------------------------------------


@pytest.mark.dist
def test_two_ranks_work_together_and_resume_where_they_were_killed():
    words = ("stub", "hydra.run.dir=out", "launch=cpu_2", "end=kill", "rank=1")
    killed = stub(*words)
    assert killed.returncode == 1
    assert "saerl: rank 1 was killed by SIGKILL" in killed.stderr
    assert len(killed.stderr.splitlines()) == 2, killed.stderr
    done = stub(*words)
    assert done.returncode == 0, done.stderr
    assert read_json(Path("out/summary.json"))["world"] == 2
    assert metrics("out") == [3.0, 6.0, 9.0, 12.0]  # 1 + 2 a step


@pytest.mark.slow
@pytest.mark.dist
def test_a_failing_rank_is_named_and_the_others_are_stopped():
    failed = stub("stub", "hydra.run.dir=out", "launch=cpu_2", "end=value_error", "rank=1")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("saerl: rank 1: the data are used up; continue with: ")


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_that_do_not_find_each_other_are_an_error(monkeypatch):
    failed = stub("stub", "hydra.run.dir=out", "launch=cpu_2", SAERL_TEST_ALONE="1")
    assert failed.returncode == 1
    assert "found each other" in failed.stderr
    assert not Path("out/summary.json").exists()


@pytest.mark.slow
def test_a_sweep_through_a_launcher(saerl, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra slurm")
    words = ["train-lm", "-m", "hydra/launcher=submitit_local", *TINY_WORDS, "model.world.steps=4,5"]
    done = saerl(*words, "hydra.sweep.dir=out", SAERL_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert [Run.load(f"out/{i}").read_summary()["steps"] for i in range(2)] == [4, 5]


def test_a_file_that_cannot_be_written_is_one_line():
    """As on a full disk: nothing longer than 100 bytes can be written."""
    limit = "import os, sys; from resource import *; setrlimit(RLIMIT_FSIZE, (100, 100)); "
    command = [sys.executable, "-c", limit + "os.execv(sys.argv[1], sys.argv[1:])", *STUB, "stub_here"]
    failed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert failed.returncode in (1, 2)
    assert failed.stderr.startswith("saerl: ")
    assert "File too large" in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
