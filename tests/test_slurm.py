"""Sweeps on a real Slurm: two nodes on this machine, brought up and taken down by slurm/up.sh and slurm/down.sh."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import TINY_WORDS

from saerl_cli.run.directory import Run

HERE = Path(__file__).parent
STUB = [sys.executable, str(HERE / "stub_command.py")]
NEEDED = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mariadb-install-db", "sbatch")
PACKAGES = "slurm-wlm munge slurmdbd mariadb-server"
ON_SLURM = ("-m", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=10")

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("empty_place")]


@pytest.fixture(scope="session")
def slurm() -> Iterator[dict[str, str]]:
    """The variables with which Slurm's commands find a cluster of two nodes; afterwards no process of it is left."""
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        pytest.skip(f"no {missing[0]} here: apt-get install --no-install-recommends {PACKAGES} (Debian)")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons for tests are started as root")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        subprocess.run([HERE / "slurm" / "up.sh", folder], check=True, timeout=180, env=os.environ | {"CPUS": "2"})
        assert len(processes_of(folder)) >= 6  # munged, mariadbd, slurmdbd, slurmctld, two slurmd
        yield {"SLURM_CONF": str(folder / "etc" / "slurm.conf")}
    finally:
        down = subprocess.run([HERE / "slurm" / "down.sh", folder], timeout=240)
        assert (down.returncode, processes_of(folder)) == (0, [])
        shutil.rmtree(folder)


def processes_of(folder: Path) -> list[str]:
    """Names of all processes that were started for a cluster, its jobs among them."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLURM_CONF", "").startswith(str(folder)):
                found.append(process.name())
        except psutil.Error:
            continue
    return found


def started(slurm: dict[str, str], *words: str) -> "subprocess.Popen[str]":
    """A command that submits jobs."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*words], text=True, env=os.environ | slurm, **pipes)  # type: ignore[call-overload]


def ended(command: "subprocess.Popen[str]", seconds: float = 300) -> tuple[int, str, str]:
    try:
        out, err = command.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        command.kill()
        raise
    return command.returncode, out, err


def ask(slurm: dict[str, str], *words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=30, env=os.environ | slurm).stdout


def wait_for(what: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


def job_of(folder: str) -> str:
    """The number of the job that writes a run directory."""
    wait_for(lambda: (Path(folder) / "run.json").is_file())
    return str(Run.load(folder).record["slurm_job_id"])


def states(slurm: dict[str, str], job: str) -> list[str]:
    """All that accounting knows of a job, a state a start."""
    return ask(slurm, "sacct", "-nXD", "-j", job, "-o", "State%-30").split()


def same_bytes(left: Path, right: Path, names: list[str]) -> None:
    for name in names:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


def test_an_array_of_three_points_and_its_repetition(slurm):
    words = (*STUB, "stub", *ON_SLURM, "seed=0,1,2", "hydra.sweep.dir=out")
    code, out, err = ended(started(slurm, *words))
    assert code == 0, err
    assert [Run.load(f"out/{i}").record["result"] for i in range(3)] == [4.0, 3.0, 2.0]
    assert "\n2      2     completed  2 " in out
    jobs = ask(slurm, "sacct", "-nX", "-o", "JobID,State").split()
    assert jobs[-6::2] == [f"{jobs[-6].split('_')[0]}_{i}" for i in range(3)]  # one array
    assert jobs[-5::2] == ["COMPLETED"] * 3
    assert ended(started(slurm, *words)) == (0, out.split("\n", 4)[4], "3 of 3 points are complete already\n")
    assert ask(slurm, "sacct", "-nX", "-o", "JobID,State").split() == jobs  # nothing was submitted


def test_two_processes_in_one_job(slurm):
    words = (*STUB, "stub", *ON_SLURM, "hydra.launcher.cpus_per_task=2", "launch=cpu_2", "hydra.sweep.dir=out")
    code, _, err = ended(started(slurm, *words))
    assert code == 0, err
    seen = Run.load("out/0").read_summary()
    assert (seen["total"], seen["world"], seen["threads"]) == (12.0, 2, 1)  # 1 + 2 a step


def test_a_job_at_its_time_limit_is_requeued_and_ends_with_the_same_bits(slurm):
    """Slurm sends a job its signal up to 30 s early: of 2 minutes less 60 s, an attempt has 30 to 60 s."""
    limit = ("hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=60", "hydra.launcher.max_num_timeout=6")
    words = (*STUB, "stub", *ON_SLURM, *limit, "steps=60", "step_seconds=1", "hydra.sweep.dir=out")
    code, _, err = ended(started(slurm, *words), 400)
    assert code == 0, err
    record = Run.load("out/0").record
    assert record["resumed"]
    job = str(record["slurm_job_id"])
    wait_for(lambda: states(slurm, job)[-1] == "COMPLETED")  # accounting hears of it after the command
    assert states(slurm, job) == ["REQUEUED"] * len(record["resumed"]) + ["COMPLETED"]
    alone = subprocess.run([*STUB, "stub", "steps=60", "hydra.run.dir=alone"], capture_output=True, timeout=120)
    assert alone.returncode == 0
    same_bytes(Path("out/0"), Path("alone"), ["walk.safetensors", "metrics.jsonl", "summary.json"])


def test_a_preempted_training_resumes_and_ends_with_the_same_bits(slurm):
    job = ("sae.tokens=200_000", "activations.buffer_tokens=8192", "sae.k=8", "eval_tokens=2_000", "checkpoint_every=5")
    command = (sys.executable, "-m", "saerl_cli.cli", "train-sae", *TINY_WORDS, *job, "site=mlp_out.1")
    alone = subprocess.run([*command, "hydra.run.dir=alone"], capture_output=True, text=True, timeout=240)
    assert alone.returncode == 0, alone.stderr
    sweep = started(slurm, *command, *ON_SLURM, "hydra.sweep.dir=out")
    wait_for(lambda: bool(list(Path("out/0/checkpoints").glob("checkpoint-*"))))
    number = job_of("out/0")
    ask(slurm, "scontrol", "requeue", number)
    code, _, err = ended(sweep)
    assert code == 0, err
    wait_for(lambda: states(slurm, number) == ["REQUEUED", "COMPLETED"])
    assert len(Run.load("out/0").record["resumed"]) == 1
    same_bytes(Path("out/0"), Path("alone"), ["sae/mlp_out.1/sae_weights.safetensors"])


def test_points_that_fail_or_are_cancelled_do_not_end_the_others(slurm):
    words = (*STUB, "stub", *ON_SLURM, "end=hang,value_error,good", "at=1", "hydra.sweep.dir=out")
    sweep = started(slurm, *words)
    ask(slurm, "scancel", ask(slurm, "squeue", "-h", "-o", "%i", "-j", job_of("out/0")).strip())  # as ARRAY_TASK
    code, _, err = ended(sweep)
    assert code == 1
    assert [Run.load(f"out/{i}").status for i in (1, 2)] == ["failed", "completed"]
    said = err.splitlines()
    assert "CANCELLED" in said[0]
    assert said[-1].startswith("saerl: 2 of 3 points are not complete: 0 (killed), 1 (failed: the data are used up); ")
    assert "Traceback" not in err
    assert len(said) == 2, err


def test_a_node_without_the_package_is_one_line(slurm):
    words = (*STUB, "stub", *ON_SLURM, 'hydra.launcher.setup=["export PYTHONPATH=/nowhere"]', "hydra.sweep.dir=out")
    code, _, err = ended(started(slurm, *words))
    assert code == 1
    said = err.splitlines()
    assert "ModuleNotFoundError: No module named 'stub_command'; install saerl there too" in said[0]
    assert said[1].startswith("saerl: 1 of 1 points are not complete: 0 (not started); continue with: saerl stub -m ")
    assert len(said) == 2, err


def test_what_the_cluster_lacks_is_refused(slurm):
    for words, says in (
        (["hydra.launcher.partition=nope"], "this cluster has no partition nope; there are tests"),
        (["hydra.launcher.nodes=2"], "would start 2 copies of every run"),
        (["hydra.launcher.cpus_per_task=3"], "cpus_per_task=3, but partition tests gives a job at most 2"),
        (["hydra.launcher.gpus_per_node=1"], "gpus_per_node=1, but partition tests gives a job at most 0"),
        (["hydra.launcher.timeout_min=61"], "timeout_min=61, but partition tests gives a job at most 60"),
        (["hydra.launcher.mem_gb=64"], "mem_gb=64, but partition tests gives a job at most 1.95"),
    ):
        code, _, err = ended(started(slurm, *STUB, "stub", *ON_SLURM, *words))
        assert (code, len(err.splitlines())) == (2, 1)
        assert says in err


def test_a_submission_that_slurm_rejects_is_one_line(slurm):
    words = (*STUB, "stub", *ON_SLURM, "hydra.launcher.constraint=nope", "hydra.sweep.dir=out")
    code, _, err = ended(started(slurm, *words))
    assert code == 1
    assert "sbatch: error" in err.splitlines()[0]
    assert len(err.splitlines()) == 2, err
