"""A Python whose commands run in a fork of `server.py`; anything else runs in the true Python, as ever.

Found by its place as `sys.executable` of those commands, so that the processes they start are forks too.
"""

import os
import signal
import socket
import sys

words = sys.argv[1:]
words = words[words[:1] == ["-u"] :]
named = words[1] if words[:1] == ["-m"] and len(words) > 1 else ""
script = words[0] if words and os.path.basename(words[0]) == "stub_command.py" else ""
if not (named.startswith("saerl_cli.") or script):
    os.execv(TRUE_PYTHON, [TRUE_PYTHON, *sys.argv[1:]])  # noqa: F821 (written above this line)

import json  # noqa: E402

parent = os.getppid()
server = socket.socket(socket.AF_UNIX)
try:
    server.connect(SERVER)  # noqa: F821
except OSError:  # it is gone: slower, and no less true
    os.execv(TRUE_PYTHON, [TRUE_PYTHON, *sys.argv[1:]])  # noqa: F821
env = os.environ | {"SAERL_FORKING_PYTHON": os.path.abspath(__file__)}
request = json.dumps({"words": words, "folder": os.getcwd(), "env": dict(env)}).encode() + b"\n"
sent = socket.send_fds(server, [request], [0, 1, 2])
server.sendall(request[sent:])
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) is not signal.SIG_IGN:
        signal.signal(number, lambda number, _: server.sendall(bytes([number])))
server.settimeout(0.5)
answer = b""
while not answer.endswith(b"\n"):
    try:
        part = server.recv(64)
    except TimeoutError:
        if os.getppid() != parent:
            os._exit(1)  # whoever started this was killed; the fork ends with it
        continue
    if not part:
        os._exit(1)
    answer += part
code = int(answer)
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
