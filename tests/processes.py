"""Processes forked from one that has its imports behind it: a fresh interpreter needs seconds for them."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVER = """
import json, os, runpy, socket, sys, traceback
import certtrain.command_line, certtrain.kernels.cpu, sklearn.datasets, torch._dynamo
from certtrain.workflows import evaluate, train, verify

channel, children = socket.socket(fileno=int(sys.argv[1])), {}
while True:
    message, descriptors, *_ = socket.recv_fds(channel, 1 << 16, 3)
    if not message:
        sys.exit()
    wanted = json.loads(message)
    if "wait" in wanted:
        pid, status = os.waitpid(wanted["wait"], wanted["options"])
        channel.send(json.dumps(os.waitstatus_to_exitcode(status) if pid else None).encode())
        continue
    child = os.fork()
    if not child:
        break
    channel.send(json.dumps(child).encode())
    for descriptor in descriptors:
        os.close(descriptor)
channel.close()
for number in range(3):
    os.close(number)
for number, descriptor in zip(wanted["open"], descriptors):
    os.dup2(descriptor, number)
for descriptor in descriptors:
    os.close(descriptor)
for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
    stream = None  # as an interpreter begins where a descriptor is closed
    if number in wanted["open"]:
        errors = "backslashreplace" if name == "stderr" else None
        stream = open(number, mode, -1 if name != "stderr" else 1, errors=errors, closefd=False)
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)
script, *sys.argv[1:] = wanted["words"]
sys.argv[0] = script
code = 1
try:
    if script == "-c":
        exec(sys.argv.pop(1), {"__name__": "__main__"})
    else:
        sys.path.insert(0, os.path.dirname(script))
        runpy.run_path(script, run_name="__main__")
    code = 0
except SystemExit as end:
    code = end.code or 0
except BaseException:
    traceback.print_exc()
try:
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.flush()
except OSError:
    code = 120  # as an interpreter ends then
finally:
    os._exit(code)  # the end of a library's threads would be waited for, which a fork does not have
"""


class Process:
    """A process that the server forked: the part of ``subprocess.Popen`` that the tests use."""

    def __init__(self, pid: int, ask: Callable):
        self.pid, self._ask, self._code = pid, ask, None

    def poll(self, options: int = os.WNOHANG) -> int | None:
        if self._code is None:
            self._code = self._ask({"wait": self.pid, "options": options})
        return self._code

    def wait(self) -> int:
        code = self.poll(0)
        assert code is not None
        return code

    @property
    def returncode(self) -> int | None:
        """The exit status that ``poll`` and ``wait`` found, or None."""
        return self._code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def start(script: str | Path, *words: str | Path, **streams: int | None) -> Process:
    """Begin a Python script, or ``-c`` and code, in the root of the checkout.

    ``stdin``, ``stdout`` and ``stderr`` are descriptors, which stay the caller's; None is a closed one, and without a
    word it is the null device.
    """
    with open(os.devnull, "r+b", buffering=0) as null:
        given = [streams.get(name, null.fileno()) for name in ("stdin", "stdout", "stderr")]
        numbers = [number for number, descriptor in enumerate(given) if descriptor is not None]
        wanted = {"words": [str(script), *map(str, words)], "open": numbers}
        return Process(_ask(wanted, [descriptor for descriptor in given if descriptor is not None]), _ask)


def run(code: str, cwd: Path = ROOT, *path: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run code to its end in a folder, with more places to find modules in, and give what it says as text."""
    surroundings = f"""
import os, sys
os.chdir({str(cwd)!r})
os.environ.update({environment!r})
sys.path[:0] = {[str(place) for place in path]!r}
"""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        ended = start("-c", surroundings + code, stdout=out.fileno(), stderr=err.fileno()).wait()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(code, ended, out.read(), err.read())


def _ask(wanted: dict, descriptors: list[int] | None = None):
    channel = _server()
    socket.send_fds(channel, [json.dumps(wanted).encode()], descriptors or [])
    return json.loads(channel.recv(1 << 16))


@cache
def _server() -> socket.socket:
    """The channel to a server of this process, begun on first use; it ends when the channel is closed with us."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        words = [sys.executable, "-c", SERVER, str(theirs.fileno())]
        subprocess.Popen(words, cwd=ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    return ours
