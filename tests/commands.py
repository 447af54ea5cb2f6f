"""Commands as tests start them: in forks of a process that has imported everything, or as a shell does."""

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
SERVER = HERE / "forkserver" / "server.py"
TRUE = [sys.executable, "-m", "saerl_cli.cli"]
"""The command as a shell starts it: for what a process's own start, end or death is the point."""
TRUE_STUB = [sys.executable, str(HERE / "stub_command.py")]


@functools.cache
def forking_python() -> str:
    """A Python whose commands are forks of a server, which this starts."""
    place = Path(tempfile.mkdtemp(prefix="saerl-fork-"))
    env = os.environ | {"PYTHONPATH": str(HERE.parent), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    with (place / "errors.txt").open("w") as errors:
        words = [sys.executable, str(SERVER), str(place / "socket")]
        server = subprocess.Popen(words, stdin=subprocess.PIPE, env=env, stderr=errors)
    assert server.stdin
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    atexit.register(server.wait)
    atexit.register(server.stdin.close)
    python = place / "python"
    names = f"TRUE_PYTHON, SERVER = {sys.executable!r}, {str(place / 'socket')!r}"
    client = (SERVER.parent / "client.py").read_text()
    python.write_text(f"#!{sys.executable} -SEs\n{names}\n{client}")
    python.chmod(0o755)
    deadline = time.monotonic() + 200
    while not (place / "socket").exists():
        assert server.poll() is None and time.monotonic() < deadline, (place / "errors.txt").read_text()
        time.sleep(0.05)
    return str(python)


def start(*words: str, timeout: float = 300, **env: str) -> "subprocess.CompletedProcess[str]":
    """Run `python WORDS` in a fork, to its end."""
    command = [forking_python(), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=os.environ | env)


def stub(*words: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """Run a command of `stub_command.py`."""
    return start(TRUE_STUB[1], *words, **env)
