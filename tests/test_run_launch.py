"""Commands, workers and what happens when they end badly, with the job of stub_command.py. About 3 s a command."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import TRUE_STUB, stub
from conftest import TINY_WORDS

from saerl_cli.config.groups import LaunchConfig, Precision, Sharding
from saerl_cli.run import launch, lock, worker
from saerl_cli.run.directory import Run
from saerl_cli.run.files import read_json, read_jsonl, write_json
from saerl_cli.run.stopping import stoppable

pytestmark = pytest.mark.usefixtures("empty_place")


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
    assert launch.environment(LaunchConfig(num_processes=2, cpu=True))["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert launch.environment(LaunchConfig())["OMP_NUM_THREADS"] == "3"
    assert launch.environment(LaunchConfig(threads=5))["OMP_NUM_THREADS"] == "5"


def test_the_shell_s_own_settings_of_accelerate_stay_outside(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    inside = launch.environment(LaunchConfig(num_processes=2, cpu=True))
    assert [name for name in inside if name.startswith(("ACCELERATE", "FSDP"))] == ["ACCELERATE_USE_CPU"]


def test_gpu_is_a_number_in_the_run_s_own_config():
    words = ("stub_here", "hydra.run.dir=out", "launch=gpu")
    done = stub(*words, CUDA_VISIBLE_DEVICES="3,5")
    assert done.returncode == 0, done.stderr
    assert "num_processes: 2" in Path("out/.hydra/config.yaml").read_text()
    assert Run.load("out").record["command"] == "saerl stub-here launch=gpu launch.num_processes=2 hydra.run.dir=out"
    assert "complete already" in stub(*words, CUDA_VISIBLE_DEVICES="0,1").stderr
    fewer = stub(*words, CUDA_VISIBLE_DEVICES="0")
    assert (fewer.returncode, "launch.num_processes=2, now 1" in fewer.stderr) == (2, True), fewer.stderr
    mixed = stub("stub_here", "-m", "launch=one,gpu", CUDA_VISIBLE_DEVICES="0,1")
    assert mixed.returncode == 2
    assert (
        mixed.stderr == "saerl: a sweep over launch= cannot count GPUs; name numbers, for instance launch=one,gpu_2\n"
    )


@pytest.mark.parametrize(
    "words, visible, message",
    [
        ("launch=gpu", "", "launch=gpu wants a process for each GPU, but there is none; write launch=cpu_2 or one"),
        ("launch=fsdp2", "", "launch=fsdp2 wants a process for each GPU, but there is none"),
        ("launch=gpu_8", "0,1", "launch.num_processes=8, but this machine has 2 GPUs; write launch=cpu_2"),
    ],
)
def test_what_this_machine_lacks_is_refused_and_nothing_is_written(monkeypatch, capfd, words, visible, message):
    from stub_command import register

    from saerl_cli.run import bridge

    register()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(SystemExit) as end:
        bridge.run("stub", ["hydra.run.dir=out", *words.split()])
    assert end.value.code == 2
    said = capfd.readouterr().err
    assert message in said and len(said.splitlines()) == 1
    assert not list(Path().iterdir())


def test_gpus_of_a_cluster_are_those_asked_of_it():
    sharded = LaunchConfig(sharding=Sharding.fsdp2)
    assert launch.counted(sharded, "gpu", 4) == 4
    with pytest.raises(ValueError, match=r"write launch.num_processes=N, or hydra.launcher.gpus_per_node=N"):
        launch.counted(sharded, "gpu", None)


# --- what Accelerate makes of accelerate.yaml ------------------------------------------------------------------------


def understood(config: LaunchConfig) -> tuple[Any, dict[str, str]]:
    """Accelerate's own reading of the file: its arguments, and the variables that its launcher gives to ranks."""
    from accelerate.commands import launch as accelerate_launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    launch.write_config(Path(launch.CONFIG), config)
    words = ["--config_file", launch.CONFIG, "--module", "x"]
    args = accelerate_launch.launch_command_parser().parse_args(words)
    args, _, _ = accelerate_launch._validate_launch_command(args)
    return args, prepare_multi_gpu_env(args)


def test_accelerate_reads_two_processes_on_a_cpu(caplog):
    args, given = understood(LaunchConfig(num_processes=2, cpu=True, mixed_precision=Precision.bf16))
    assert (args.multi_gpu, args.num_processes, args.num_machines, args.nproc_per_node) == (True, 2, 1, "2")
    assert given["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert not caplog.records  # it warns of what the file leaves open


def test_accelerate_leaves_a_split_model_to_transformers():
    """Its own FSDP would split adapters too, and is not to be had on a CPU."""
    args, given = understood(LaunchConfig(num_processes=4, sharding=Sharding.fsdp2))
    assert (args.use_fsdp, args.multi_gpu, args.num_processes) == (False, True, 4)
    assert not any(name.startswith("FSDP") for name in given)
    assert LaunchConfig(num_processes=4, sharding=Sharding.fsdp2).shards == 4
    assert LaunchConfig(num_processes=4).shards == 1


@pytest.mark.parametrize("got, asked", [(1, 2), (2, 1)])
def test_a_wrong_world_size_is_an_error(got, asked):
    with pytest.raises(RuntimeError, match=f"num_processes={asked}, but {got}"):
        worker.check_world_size(got, asked)


# --- what a failure is called ----------------------------------------------------------------------------------------

TWO = LaunchConfig(num_processes=2, cpu=True)


def failed(codes: dict[int, int], *said: tuple[int, float, str]) -> str:
    """The message when ranks left these exit codes and reports (rank, seconds, message)."""
    write_json(Path(launch.CODES), codes)
    for rank, when, message in said:
        traceback = f"traceback {rank}" if "Error" in message else None
        write_json(
            Path(f".error.{rank}.json"), {"rank": rank, "time": when, "message": message} | {"traceback": traceback}
        )
    message = launch.failure(Path(), TWO, 1)
    assert not list(Path().glob(".*.json"))
    return message


def test_all_ranks_that_failed_by_themselves_are_in_one_message():
    assert failed({1: 1, 0: -15}, (1, 10.0, "too little text")) == "rank 1: too little text"
    assert failed({0: 1, 1: 1}, (1, 10.2, "too little text"), (0, 10.0, "too little text")) == (
        "ranks 0 and 1: too little text"
    )
    assert failed({0: 1, 1: 1}, (1, 10.2, "KeyError: b"), (0, 10.0, "KeyError: a")) == (
        "rank 0: KeyError: a; rank 1: KeyError: b"
    )
    assert Path("error.txt").read_text() == "traceback 0\ntraceback 1"


def test_ranks_that_only_lost_a_neighbour_are_left_out():
    assert failed({0: 1, 1: 1}, (0, 10.0, "no file"), (1, 10.7, "Connection closed by peer")) == "rank 0: no file"
    lost = (0, 10.0, "Connection closed by peer")
    assert failed({1: -9, 0: -15}, lost) == "rank 1 was killed by SIGKILL (out of memory, if nobody did it)"
    assert failed({1: -11, 0: 1}, lost) == "rank 1 was killed by SIGSEGV"
    assert failed({0: -9, 1: -9}).startswith("ranks 0 and 1 were killed by SIGKILL")
    assert failed({1: 3, 0: -15}) == "rank 1 ended with exit code 3"


def test_a_launcher_that_is_gone_is_named():
    assert launch.failure(Path(), TWO, -9).startswith("accelerate launch was killed by SIGKILL")
    assert launch.failure(Path(), TWO, 1) == "accelerate launch ended with exit code 1"
    assert launch.failure(Path(), LaunchConfig(), -9).startswith("the worker was killed by SIGKILL")


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
    assert again.stderr == "out is complete already: total 4, world 1, threads 1, precision no\n"
    other = stub("stub", "hydra.run.dir=out", "seed=2")
    assert other.returncode == 2
    assert "started with other settings (seed=1, now 2)" in other.stderr
    assert Run.load("out").record == run.record
    another_job = stub("stub_here", "hydra.run.dir=out", "seed=1")
    assert another_job.returncode == 2
    assert "is a run of saerl stub; take another hydra.run.dir" in another_job.stderr
    record = read_json(Path("out/run.json"))
    write_json(Path("out/run.json"), record | {"job": "train_lm"})
    assert "out is a run of saerl train-lm; take another" in stub("stub", "hydra.run.dir=out", "seed=1").stderr


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
    process = subprocess.Popen([*TRUE_STUB, *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("words", [("stub", "hydra.run.dir=some/where"), ("stub", "-m", "seed=1,2")])
def test_a_signal_during_the_checks_is_one_line_and_leaves_nothing(words, number):
    env = os.environ | {"SAERL_TEST_HANG_CHECK": "checking"}
    with subprocess.Popen([*TRUE_STUB, *words], stderr=subprocess.PIPE, text=True, env=env) as command:
        for _ in until(60):
            if Path("checking").exists():
                break
        command.send_signal(number)
        said = command.communicate(timeout=30)[1]
    assert (command.returncode, said) == (1, "saerl: interrupted\n")
    assert [path.name for path in Path().iterdir()] == ["checking"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_imports_is_one_line(number):
    """Of commands without a run directory; a torch that never comes stands for one that takes its time."""
    Path("site").mkdir()
    Path("site/torch.py").write_text("import pathlib, time; pathlib.Path('importing').touch(); time.sleep(600)")
    path = os.pathsep.join(["site", os.environ["PYTHONPATH"]])
    command = [sys.executable, "-m", "saerl_cli.cli", "plan", "rlhf"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}) as saerl:
        for _ in until(60):
            if Path("importing").exists():
                break
        assert Path("importing").exists()
        saerl.send_signal(number)
        said = saerl.communicate(timeout=30)[1]
    assert (saerl.returncode, said) == (1, "saerl: interrupted\n")


@pytest.mark.parametrize("before, ends", [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_closed_terminal_ends_a_command_unless_it_runs_under_nohup(before, ends):
    saved = signal.signal(signal.SIGHUP, before)
    try:
        with pytest.raises(KeyboardInterrupt) if ends else contextlib.nullcontext(), stoppable(), stoppable():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
        assert signal.getsignal(signal.SIGHUP) is before
    finally:
        signal.signal(signal.SIGHUP, saved)


def test_a_run_that_is_interrupted_before_it_begins_leaves_no_directory(monkeypatch, capfd):
    from stub_command import register

    from saerl_cli.run import bridge

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    register()
    Path("there").mkdir()
    for folder in ("some/where", "there"):
        monkeypatch.setattr(bridge, "call_hydra", interrupted)
        with pytest.raises(SystemExit) as end:
            bridge.run("stub_here", [f"hydra.run.dir={folder}"])
        assert (end.value.code, capfd.readouterr().err) == (1, "saerl: interrupted\n")
    assert [path.name for path in Path().iterdir()] == ["there"]


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


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_work_together_and_resume_where_they_were_killed(tmp_path):
    words = ("stub", "hydra.run.dir=out", "launch=cpu_2", "end=kill", "rank=1")
    killed = stub(*words)
    assert killed.returncode == 1
    assert "saerl: rank 1 was killed by SIGKILL" in killed.stderr
    assert len(killed.stderr.splitlines()) == 2, killed.stderr
    assert Run.load("out").status == "failed"
    theirs = tmp_path / "home" / "accelerate" / "default_config.yaml"  # what `accelerate config` left
    theirs.parent.mkdir(parents=True)
    theirs.write_text("{compute_environment: LOCAL_MACHINE, distributed_type: 'NO', num_processes: 1, use_cpu: true}\n")
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "ACCELERATE_MIXED_PRECISION": "bf16"}
    done = subprocess.run([*TRUE_STUB, *words], capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == "counting: 2/4"
    assert read_json(Path("out/summary.json")) == {"total": 12, "world": 2, "threads": 1, "precision": "no"}
    assert metrics("out") == [3.0, 6.0, 9.0, 12.0]  # 1 + 2 a step
    assert not [path.name for path in Path("out").iterdir() if path.name.startswith(".") and path.name != ".hydra"]


@pytest.mark.slow
@pytest.mark.dist
def test_a_failing_rank_is_named_and_the_others_are_stopped():
    failed = stub("stub", "hydra.run.dir=out", "launch=cpu_2", "end=value_error", "rank=1")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("saerl: rank 1: the data are used up; continue with: ")


@pytest.mark.slow
@pytest.mark.dist
def test_ranks_that_do_not_find_each_other_are_an_error():
    """What Accelerate makes of two ranks that are promised GPUs and find none: two times rank 0 of 1."""
    if Path("/proc/driver/nvidia/gpus").is_dir():
        pytest.skip("this machine has a GPU")
    failed = stub("stub", "hydra.run.dir=out", "launch=gpu_2", CUDA_VISIBLE_DEVICES="0,1")
    assert failed.returncode == 1
    assert "saerl: ranks 0 and 1: RuntimeError: launch.num_processes=2, but 1 process(es) found" in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
    assert not Path("out/summary.json").exists()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_command_leaves_no_ranks_behind(number):
    with started(*HANGS, "launch=cpu_2") as command:
        below = workers(command)
        assert len(below) == 3  # the launcher and two ranks
        command.send_signal(number)
        _, said = command.communicate(timeout=30)
    for _ in until(5):
        if not alive(below):
            break
    assert not alive(below)
    if number != signal.SIGKILL:
        assert command.returncode == 1
        assert said.splitlines()[-1].startswith("saerl: interrupted; continue with: saerl stub end=hang launch=cpu_2")
        assert Run.load("out").status == "interrupted"


@pytest.mark.slow
def test_a_sweep_through_a_launcher(saerl, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra slurm")
    words = ["train-lm", "-m", "hydra/launcher=submitit_local", *TINY_WORDS, "model.planted.steps=4,5"]
    done = saerl(*words, "hydra.sweep.dir=out", SAERL_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert [Run.load(f"out/{i}").read_summary()["steps"] for i in range(2)] == [4, 5]


def test_a_file_that_cannot_be_written_is_one_line():
    """As on a full disk: nothing longer than 100 bytes can be written."""
    limit = "import os, sys; from resource import *; setrlimit(RLIMIT_FSIZE, (100, 100)); "
    command = [sys.executable, "-c", limit + "os.execv(sys.argv[1], sys.argv[1:])", *TRUE_STUB, "stub_here"]
    failed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert failed.returncode in (1, 2)
    assert failed.stderr.startswith("saerl: ")
    assert "File too large" in failed.stderr
    assert len(failed.stderr.splitlines()) == 1
