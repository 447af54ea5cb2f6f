"""Run directories and their locks."""

import json
import os
import socket
import subprocess
import sys

import psutil
import pytest

from saerl_cli.rl.runs import run_config
from saerl_cli.run import lock
from saerl_cli.run.directory import Run
from saerl_cli.run.files import read_json, read_jsonl, sha256_file, write_json
from saerl_cli.run.preflight import SAE_WEIGHTS, refuse_changed_saes
from saerl_cli.sae.files.saelens import WEIGHTS_FILE


def test_the_record_of_a_run_keeps_what_an_earlier_start_wrote(tmp_path):
    run = Run(tmp_path / "run")
    run.start("rlhf", "saerl rlhf hydra.run.dir=run", seed=3)
    run.update(inputs={"model": {"name": "planted"}})
    first = run.record
    assert (first["status"], first["job"], first["seed"]) == ("running", "rlhf", 3)
    assert {"started", "versions", "git_commit", "git_dirty", "hostname", "device", "command"} <= first.keys()
    assert first["versions"]["torch"].startswith("2.")
    run.end("interrupted")
    run.start("rlhf", "saerl rlhf hydra.run.dir=run", seed=3)
    again = run.record
    assert again["started"] == first["started"]
    assert len(again["resumed"]) == 1
    assert again["inputs"] == first["inputs"]
    run.end("completed")
    assert run.status == "completed"
    assert run.record["ended"]


def test_a_run_that_does_not_write_writes_nothing(tmp_path):
    run = Run(tmp_path, writes=False)
    run.start("rlhf")
    run.log(1, loss=1.0)
    run.sample(1, "a", "b", 0.0, 0.0)
    run.summary({"a": 1})
    run.update(a=1)
    run.truncate(0)
    run.keep(1)
    run.end("completed")
    assert list(tmp_path.iterdir()) == []


def test_a_metric_that_is_not_finite_names_itself_and_the_step(tmp_path):
    with pytest.raises(ValueError, match="step 7: metrics.jsonl: loss is nan"):
        Run(tmp_path).log(7, loss=float("nan"))


def test_truncating_leaves_the_lines_of_an_unbroken_run(tmp_path):
    run = Run(tmp_path)
    for step in range(5):
        run.log(step, loss=step / 2)
        run.sample(step, "p", "c", 1.0, 0.1)
    run.truncate(2)
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert [line["step"] for line in read_jsonl(tmp_path / "samples.jsonl")] == [0, 1, 2]


def test_a_torn_line_and_half_written_files_are_gone_after_the_next_start(tmp_path):
    run = Run(tmp_path)
    run.log(1, loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2')
    (tmp_path / "checkpoints" / ".checkpoint-4.partial.99").mkdir(parents=True)
    (tmp_path / ".summary.json.partial.99").write_text("{")
    run.start("rlhf")
    run.log(2, loss=2.0)
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
    assert not list(tmp_path.rglob("*.partial.*"))


def test_checkpoints_are_complete_or_absent_and_old_ones_go(tmp_path):
    run = Run(tmp_path)
    assert run.latest_checkpoint() is None
    for step in (9, 10, 11):
        with run.save_checkpoint(step) as folder:
            write_json(folder / "state.json", step)
    assert [step for step, _ in run.checkpoints()] == [10, 11]
    with pytest.raises(OSError), run.save_checkpoint(12):
        raise OSError("disk full")
    step, folder = run.latest_checkpoint() or (0, tmp_path)
    assert (step, read_json(folder / "state.json")) == (11, 11)
    assert sorted(path.name for path in run.checkpoint_folder.iterdir()) == ["checkpoint-10", "checkpoint-11"]


def test_a_run_of_an_earlier_version_is_read_in_todays_words(tmp_path):
    old = {"model": {"world": {"seed": 3}}, "reward": {"parts": {"curses": {"kind": "world", "attribute": "cursing"}}}}
    flat = {"model.world.seed": 3, "reward.parts.curses.kind": "world"}
    (tmp_path / ".hydra").mkdir()
    write_json(tmp_path / ".hydra" / "config.yaml", old)  # JSON is YAML
    write_json(tmp_path / "run.json", {"job": "rlhf", "world": 2, "trained_with": flat})
    write_json(tmp_path / "summary.json", {"measured": {"reward": old["reward"]}, "kind": "world"})
    run = Run(tmp_path)
    part = {"kind": "planted", "attribute": "cursing"}
    assert run.settings == {"model": {"planted": {"seed": 3}}, "reward": {"parts": {"curses": part}}}
    assert run.record["trained_with"] == {"model.planted.seed": 3, "reward.parts.curses.kind": "planted"}
    assert run.record["world"] == 2
    assert run.read_summary() == {"measured": {"reward": {"parts": {"curses": part}}}, "kind": "world"}
    config = run_config(tmp_path)
    assert config.model.planted.seed == 3 and config.reward.parts["curses"].kind == "planted"


def test_reading_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run.json"):
        Run.load(tmp_path)


# --- lock ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def other():
    """A process that holds locks."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def identity(pid: int, shift: float = 0.0) -> dict:
    return {"pid": pid, "started": psutil.Process(pid).create_time() + shift}


def write_lock(folder, command, worker=None, host=None, slurm_job=None):
    value = {"host": host or socket.gethostname(), "slurm_job": slurm_job, "command": command, "worker": worker}
    (folder / ".lock").write_text(json.dumps(value))


def test_a_living_process_keeps_others_out_and_is_named(tmp_path, other):
    write_lock(tmp_path, identity(other.pid))
    with pytest.raises(lock.InUse, match=f"process {other.pid} on {socket.gethostname()}"):
        Run(tmp_path).start("rlhf")
    other.kill()
    other.wait()
    Run(tmp_path).start("rlhf")
    assert read_json(tmp_path / ".lock")["command"]["pid"] == os.getpid()


def test_a_process_that_got_the_id_of_a_dead_holder_does_not_count(tmp_path, other):
    write_lock(tmp_path, identity(other.pid, shift=-100.0))
    lock.acquire(tmp_path)


def test_a_zombie_does_not_count(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    write_lock(tmp_path, identity(child.pid))
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:  # ended, and not waited for
        pass
    lock.acquire(tmp_path)
    child.wait()


def test_the_worker_of_a_dead_command_still_holds(tmp_path, other, monkeypatch):
    dead = {"pid": 2**22 - 1, "started": 1.0}
    write_lock(tmp_path, dead, worker=identity(other.pid))
    monkeypatch.setattr(lock, "ORPHAN_S", 0.2)
    with pytest.raises(lock.InUse, match=str(other.pid)):
        lock.refuse_if_held(tmp_path, wait=0.2)


def test_waiting_for_an_orphan_that_ends(tmp_path, other):
    write_lock(tmp_path, {"pid": 2**22 - 1, "started": 1.0}, worker=identity(other.pid))
    other.kill()  # a zombie from now on
    lock.refuse_if_held(tmp_path, wait=5)


def test_another_machine_counts_as_alive_and_the_message_says_what_to_delete(tmp_path):
    write_lock(tmp_path, {"pid": 1, "started": 1.0}, host="elsewhere")
    with pytest.raises(lock.InUse, match=r"on elsewhere.*delete .*\.lock"):
        lock.acquire(tmp_path)


def test_a_requeued_slurm_job_takes_its_own_lock(tmp_path, monkeypatch):
    write_lock(tmp_path, {"pid": 1, "started": 1.0}, host="elsewhere", slurm_job="77")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    lock.acquire(tmp_path)


def test_a_slurm_job_that_squeue_lists_no_more_is_over(tmp_path, monkeypatch):
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text('#!/bin/sh\n[ "$3" = 5 ] && echo running\nexit 0\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    write_lock(tmp_path, {"pid": 1, "started": 1.0}, host="elsewhere", slurm_job="5")
    with pytest.raises(lock.InUse):
        lock.acquire(tmp_path)
    write_lock(tmp_path, {"pid": 1, "started": 1.0}, host="elsewhere", slurm_job="6")
    lock.acquire(tmp_path)


def test_releasing_removes_only_ones_own_lock(tmp_path, other):
    write_lock(tmp_path, identity(other.pid))
    lock.release(tmp_path)
    assert (tmp_path / ".lock").is_file()
    other.kill()
    other.wait()
    lock.acquire(tmp_path)
    lock.acquire(tmp_path)  # the same process again
    lock.release(tmp_path)
    assert not (tmp_path / ".lock").exists()


def test_many_that_start_at_once_agree_on_one(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from saerl_cli.run import lock; sys.stdin.readline()\n"
        "try:\n    lock.acquire(Path(sys.argv[1])); print('got it', flush=True); time.sleep(3)\n"
        "except lock.InUse: print('in use', flush=True)"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(words, **pipes) for _ in range(5)]
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    said = sorted(process.communicate()[0].strip() for process in started)
    assert said == ["got it"] + ["in use"] * 4


def test_a_run_is_not_resumed_on_an_sae_that_changed(tmp_path):
    weights = tmp_path / "sae" / "sae_weights.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"weights")
    (weights.parent / "sparsity.safetensors").write_bytes(b"which other tools write beside them")
    run = Run(tmp_path / "run")
    run.start("rlhf")
    run.update(inputs={"sae": {"mlp_out.1": {"path": str(weights.parent), "sha256": sha256_file(weights)}}})
    run.end("interrupted")
    with run.save_checkpoint(1):
        pass
    refuse_changed_saes(run.path)
    weights.write_bytes(b"other weights")
    assert SAE_WEIGHTS == WEIGHTS_FILE
    with pytest.raises(ValueError, match=r"begun with another SAE at mlp_out\.1: .* take another hydra\.run\.dir"):
        refuse_changed_saes(run.path)


def test_a_run_without_a_checkpoint_begins_anew_on_any_sae(tmp_path):
    run = Run(tmp_path / "run")
    run.start("rlhf")
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "sae_weights.safetensors").write_bytes(b"other")
    run.update(inputs={"sae": {"mlp_out.1": {"path": str(tmp_path / "sae"), "sha256": "0" * 64}}})
    refuse_changed_saes(run.path)
