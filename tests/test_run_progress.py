"""What a person sees while a job works."""

import os
import re
import sys
from pathlib import Path

import pytest

from saerl_cli.run import progress as module
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
