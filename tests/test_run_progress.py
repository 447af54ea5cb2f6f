"""What a person sees while a job works."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from saerl_cli.run import progress as module
from saerl_cli.run import watching
from saerl_cli.run.directory import Run
from saerl_cli.run.files import last_jsonl
from saerl_cli.run.progress import bar, progress, say, task_bars


def test_plain_lines_at_the_start_now_and_then_and_at_the_end(capsys, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    assert list(progress(range(4, 10), "counting")) == [4, 5, 6, 7, 8, 9]
    assert capsys.readouterr().err.splitlines() == [
        "counting: 4/10",
        "counting: 7/10, about 30 s left",  # 10 s each
        "counting: 10/10, about 0 s left",
        "counting: 10/10 in 70 s",
    ]


@pytest.mark.parametrize(
    "items, arguments, lines",
    [
        (3, {}, ["x: 0/3", "x: 3/3 in 0 s"]),
        (3, {"start": 2}, ["x: 2/3", "x: 3/3 in 0 s"]),
        ([1, 2], {"start": 1}, ["x: 1/3", "x: 3/3 in 0 s"]),
        (iter("ab"), {}, ["x: 0", "x: 2 in 0 s"]),
        (iter("ab"), {"total": 2}, ["x: 0/2", "x: 2/2 in 0 s"]),
    ],
)
def test_how_many_there_are(capsys, items, arguments, lines):
    list(progress(items, "x", **arguments))
    assert capsys.readouterr().err.splitlines() == lines


def test_only_the_first_rank_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    say("hello")
    with bar(3, "x") as advance:
        advance(1, note="y")
    with task_bars(["a"]) as update:
        update("a", 1.0, "done")
    assert capsys.readouterr().err == ""


def test_tasks_side_by_side_say_their_end_once(capsys):
    with task_bars(["a", "b"]) as update:
        for share in (0.0, 0.5, 1.0, 1.0):
            update("a", share, "loss 1")
    assert capsys.readouterr().err == "a: 100% loss 1\n"


@pytest.mark.slow
def test_bars_on_a_terminal_and_a_visible_cursor_after_ctrl_c(empty_place):
    import pexpect

    stub = str(Path(__file__).parent / "stub_command.py")
    words = [stub, "stub", "hydra.run.dir=out", "steps=100", "step_seconds=0.05"]
    env = os.environ | {"TERM": "xterm-256color"}
    shell = pexpect.spawn(sys.executable, words, env=env, encoding="utf8", codec_errors="replace", timeout=60)
    shell.expect(re.escape("counting"))
    shell.expect("[2-9]%")
    shell.sendintr()
    shell.expect(pexpect.EOF)
    shell.close()
    assert shell.exitstatus == 1
    assert "\x1b[?25hsaerl: interrupted; continue with: saerl stub" in shell.before


# --- saerl runs --watch ----------------------------------------------------------------------------------------------


def running(folder: Path, phases: int = 4) -> Run:
    """A run of rlhf that says it is at work, two phases done."""
    run = Run(folder)
    run.start("rlhf", "saerl rlhf ...")
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text(f"algo: {{phases: {phases}}}\n")
    for phase, reward in ((1, -1.0), (2, 0.5)):
        run.log(phase, phase=phase, reward=reward, kl=0.1 * phase, samples_per_second=8.0, seconds=3.0)
    run.sample(0, "once upon", "a [red]time[/red]\nthere\x1b[2J was", 1.0, 0.2)
    return run


def test_a_running_job_shows_how_far_it_is_its_numbers_and_samples(tmp_path):
    text = watching.picture(running(tmp_path / "a")).plain
    assert "phase 2/4, about 6 s left" in text and "reward 0.500  KL 0.20 nats  8.0 samples/s" in text
    assert "reward ▁█" in text
    assert "once upon a [red]time[/red] there [2J was  [1.00]" in text, "control characters and markup do nothing"


JOB = """
import sys, time
from pathlib import Path
from saerl_cli.run.directory import Run
run = Run(sys.argv[1])
run.start("rlhf", "saerl rlhf ...")
run.log(1, phase=1, reward=0.5)
print("at work", flush=True)
sys.stdin.readline()
run.end("completed")
"""
"""A job in a process of its own: a lock of this very process counts as free."""


def test_watching_ends_when_nothing_runs_any_more(tmp_path, capsys):
    Run(tmp_path / "b").start("rlhf", "saerl rlhf ...")
    Run(tmp_path / "b").end("failed", "it broke")
    command = [sys.executable, "-c", JOB, str(tmp_path / "a")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdin and job.stdout and job.stdout.readline() == "at work\n"
        assert [run.path.name for run in watching.running_jobs([tmp_path])] == ["a"]
        threading.Timer(0.3, job.stdin.close).start()
        assert watching.watch([tmp_path], every=0.05) == 1
    assert "reward 0.500" in capsys.readouterr().out
    assert watching.watch([tmp_path]) == 0


def test_the_command_lists_when_there_is_nothing_to_watch(saerl, tmp_path):
    running(tmp_path / "a").end("completed")
    done = saerl("runs", "--watch", str(tmp_path))
    assert done.returncode == 0 and "completed" in done.stdout


def test_only_the_end_of_a_long_file_is_read(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"step": {i}}}\n' for i in range(1000)) + '{"step": 10')
    assert [row["step"] for row in last_jsonl(file, 3)] == [997, 998, 999]
    assert [row["step"] for row in last_jsonl(file, 100, reach=40)] == [998, 999], "the first line may be cut"
    assert last_jsonl(tmp_path / "none", 3) == []
