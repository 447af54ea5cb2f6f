"""A process that has imported everything and forks itself for every command: `python server.py SOCKET`.

A test's command is then spared 8 s of imports, for itself and each of its ranks. `client.py`, the Python of such
commands, hands over its words, variables, folder and streams; they run in a fork of this process, whose state is that
of an interpreter that has imported and nothing more. The fork has a keeper, which passes on signals and the exit code,
and ends it when its client is gone. Its own processes (workers, the launcher, ranks, the demo's stages) are forks of
it, children as the true ones.
"""

import atexit
import json
import logging
import os
import pkgutil
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import datasets
import numpy
import torch
import transformers
from accelerate.state import AcceleratorState
from hydra.core.global_hydra import GlobalHydra

NEEDED = (
    "accelerate.commands.launch", "hydra.main", "hydra._internal.hydra", "jinja2", "matplotlib.pyplot",
    "scipy.optimize", "scipy.stats", "torch.distributed.fsdp", "torch.distributed.run", "transformers.generation",
    "transformers.models.gpt_neox.modeling_gpt_neox", "transformers.models.llama.modeling_llama",
    "vaderSentiment.vaderSentiment",
)  # fmt: skip
"""What commands import besides the package itself."""


def serve(place: str) -> None:
    """Import, listen, and fork for every client until standard input closes."""
    import saerl_cli

    own = sys.path.pop(0)
    for entry in os.environ["PYTHONPATH"].split(os.pathsep):
        if entry in sys.path:
            sys.path.remove(entry)
    library = list(sys.path)
    sys.path[:0] = [str(Path(saerl_cli.__file__).parents[1])]
    assert own == str(Path(__file__).parent)
    for name in (*NEEDED, *(found.name for found in pkgutil.walk_packages(saerl_cli.__path__, "saerl_cli."))):
        import_module(name)
    assert threading.active_count() == 1, "forks of a process with threads are not sound"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place + ".new")
    listener.listen(64)
    os.rename(place + ".new", place)  # whoever sees it can connect
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            keep(client, library)
        client.close()


def keep(client: socket.socket, library: list[str]) -> None:
    """Run a client's command in a child, pass signals on and the exit code back."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    message, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
    while not message.endswith(b"\n"):
        message += client.recv(1 << 20)
    request = json.loads(message)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    child = os.fork()
    if child == 0:
        signal.set_wakeup_fd(-1)
        end(library, streams, **request)
    for stream in streams:
        os.close(stream)
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        ready, _, _ = select.select([client, woken], [], [])
        if client in ready:
            numbers = client.recv(1)
            os.kill(child, numbers[0] if numbers else signal.SIGKILL)
            if not numbers:
                os._exit(0)
        elif woken in ready:
            os.read(woken, 64)
    _, status = os.waitpid(child, 0)
    client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


START = subprocess.Popen.__init__


def forking(library: list[str]) -> Callable[..., None]:
    """What `Popen` does in a fork: start this package's modules as forks, everything else as ever."""

    def start(self: subprocess.Popen, args: Any, *more: Any, **settings: Any) -> None:
        words = list(args) if isinstance(args, list | tuple) else [args]
        module = words[words.index("-m") + 1] if "-m" in words[1:3] else ""
        if words[0] == sys.executable and module.startswith("saerl_cli."):
            env, folder = dict(settings.get("env") or os.environ), str(settings.get("cwd") or os.getcwd())
            given = library, [0, 1, 2], words[words.index("-m") :], folder, env
            sys.stdout.flush()
            sys.stderr.flush()
            settings["preexec_fn"] = lambda: end(*given)
        START(self, args, *more, **settings)

    return start


def end(*given, **more) -> NoReturn:
    """Be another Python until its end, whatever happens."""
    code = 70
    try:
        code = become(*given, **more)
    finally:
        os._exit(code)


def become(library: list[str], streams: list[int], words: list[str], folder: str, env: dict[str, str]) -> int:
    """Be `python WORDS` in `folder` with the variables `env`; returns the exit code."""
    for number, stream in enumerate(streams):
        if number != stream:
            os.dup2(stream, number)
    os.closerange(3, 1024)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, closefd=False)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    first = folder if words[0] == "-m" else str(Path(words[0]).resolve().parent)
    sys.path[:] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)), *library]
    sys.executable, subprocess.Popen.__init__ = env["SAERL_FORKING_PYTHON"], forking(library)
    forget()
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    if env.get("TRANSFORMERS_VERBOSITY") == "error":  # read when it is imported
        transformers.utils.logging.set_verbosity_error()
        datasets.disable_progress_bars()
    try:
        for entry in sys.path:
            if (site := Path(entry, "sitecustomize.py")).is_file():
                runpy.run_path(str(site))
                break
        if words[0] == "-m":
            sys.argv = ["-m", *words[2:]]
            sys.modules.pop(words[1], None)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def forget() -> None:
    """Leave behind what the process that forked has set: signals, logging, chance, Hydra's and Accelerate's state."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    logging.disable(logging.NOTSET)
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    random.seed()
    numpy.random.seed()
    GlobalHydra.instance().clear()
    AcceleratorState._reset_state(reset_partial_state=True)


if __name__ == "__main__":
    serve(sys.argv[1])
