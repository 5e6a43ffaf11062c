"""Runs α-β-CROWN as a child process in its own interpreter, on exported ONNX and VNN-LIB files.

It is driven as the release of December 2025 (8250d5f), in csv mode, which loads the network once. Results are read
from its log.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from subprocess import DEVNULL, Popen
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from ..errors import InputError, writing
from .problem import Status

Settings = Mapping[str, Any]

PYTHON, HOME = "CERTTRAIN_ABCROWN_PYTHON", "CERTTRAIN_ABCROWN_HOME"
MOST_CRASHES = 3  # in a row, each on its process's first property: then the property is not the cause
POLL, KILL_AFTER = 0.1, 5.0  # seconds: between reads of the log; from SIGTERM to SIGKILL
STARTED_LINE = re.compile(r"%{5,} idx: ([0-9]+), vnnlib ID: [0-9]+ %{5,}")
RESULT_LINE = re.compile(r"Result: (\S+)( \(timed out\))? in ([0-9]+(?:\.[0-9]+)?) seconds")
ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
TRACEBACK = re.compile(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*(\S.*)", re.MULTILINE)
COORDINATE = re.compile(r"\(X_([0-9]+)\s+([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\)")
DECIDED: dict[str, Status] = {"safe": "verified", "unsafe": "falsified"}  # also safe-incomplete, unsafe-pgd, …
# value of its option adv_saver, an expression; with the default each counterexample overwrites the one before
SAVER = "lambda x, y, path: default_adv_saver(x, y, path + str(arguments.Globals['example_idx']))"
PIP = {"yaml": "pyyaml", "onnx2pytorch": "git+https://github.com/Verified-Intelligence/onnx2pytorch"}
PROBE = r"""
import importlib, json, platform
versions, missing = {"python": platform.python_version()}, {}
for name in (
    "torch torchvision numpy yaml tqdm appdirs graphviz packaging auto_LiRPA onnx skl2onnx onnxruntime onnxoptimizer "
    "onnx2pytorch gurobipy pandas psutil sortedcontainers abcrown"
).split():
    try:
        versions[name] = str(getattr(importlib.import_module(name), "__version__", ""))
    except ModuleNotFoundError as error:
        missing[error.name] = ""
    except BaseException as error:
        missing[name] = f"{type(error).__name__}: {error}"
print("\nFOUND " + json.dumps([versions, missing]))
"""


@dataclass(frozen=True)
class AbcrownAnswer:
    """α-β-CROWN's answer on one property.

    Args:
        number, property: the property's place in the list, from 0, and its file.
        status: its result in certtrain's words.
        seconds: by α-β-CROWN's clock; by ours where it gave no result.
        said: α-β-CROWN's word, such as safe-incomplete or unsafe-pgd; None without a result.
        reason: why there is no result; None with one.
        log: the file of the process's output.
        counterexample: (inputs,) float32, also a late one. It must be replayed: α-β-CROWN tolerates 1e-4 in outputs and
            box.
    """

    number: int
    property: Path
    status: Status
    seconds: float
    said: str | None
    reason: str | None
    log: Path
    counterexample: Tensor | None = None


class ResultLine(NamedTuple):
    """A result in the log: α-β-CROWN's word, whether it came after the timeout, and seconds by its clock."""

    word: str
    late: bool
    seconds: float

    def status(self, timeout: float) -> Status:
        """The result in certtrain's words; a late one is no decision."""
        decided = DECIDED.get(self.word.partition("-")[0])
        if decided and not self.late:
            return decided
        return "timeout" if self.late or self.seconds >= timeout else "unknown"


def parse(line: str) -> int | ResultLine | None:
    """Parse a line of the log: the place of the property that it starts, the result on a property, or None."""
    line = ANSI.sub("", line)
    if begun := STARTED_LINE.search(line):
        return int(begun[1])
    result = RESULT_LINE.search(line)
    return result and ResultLine(result[1], bool(result[2]), float(result[3]))


def exit_reason(code: int, log: Path) -> str:
    """Why a process ended without a result: its signal, the last line of its last traceback, or its exit code."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    errors = TRACEBACK.findall(ANSI.sub("", log.read_text(errors="replace"))) if code else []
    return errors[-1].strip()[:300] if errors else f"ended without a result, exit code {code}"


def read_counterexample(path: Path, inputs: int) -> Tensor | None:
    """Read a counterexample (inputs,) float32 from ``((X_0 v) … (Y_9 v))``; None unless every X is there, in order."""
    pairs = COORDINATE.findall(path.read_text(errors="replace")) if path.exists() else []
    complete = [int(number) for number, _ in pairs] == list(range(inputs))
    return torch.tensor([float(value) for _, value in pairs], dtype=torch.float32) if complete else None


def configuration(timeout: float, device: str, *, root: str = "$CONFIG_PATH", csv: str = "instances.csv") -> Settings:
    """α-β-CROWN's settings, for a YAML file. The attack comes after the bounds and is shortened: its default, before
    the bounds, is too slow on a CPU.

    Args:
        timeout: seconds for each property, where the csv gives none. device: cpu or cuda.
        root: the folder of the files named in the csv; ``$CONFIG_PATH`` stands for that of the YAML file.
        csv: the table of the properties.
    """
    general = {"device": device, "enable_incomplete_verification": True, "complete_verifier": "bab"}
    return {
        "general": {**general, "root_path": root, "csv_name": csv},
        "attack": {"pgd_order": "after", "pgd_steps": 50, "pgd_restarts": 5},
        "solver": {"batch_size": 64, "alpha-crown": {"iteration": 20}, "beta-crown": {"iteration": 20}},
        "bab": {"timeout": timeout, "branching": {"method": "kfsb"}},
    }


@dataclass(frozen=True)
class Abcrown:
    """An installation of α-β-CROWN.

    Args:
        python: its interpreter. home: its folder ``complete_verifier``.
        grace: a process is ended 2 · timeout + ``grace`` seconds after it started a property. Its own timeouts are soft
            (79 s at a timeout of 60).
        batch: number of properties that share a process and its start-up of about 10 s.
    """

    python: Path
    home: Path
    grace: float = 60.0
    batch: int = 500

    @classmethod
    def find(cls, python: str | Path | None = None, home: str | Path | None = None) -> Abcrown:
        """Find the installation from the arguments, or else from the environment variables ``PYTHON`` and ``HOME`` of
        this module. ``home`` may be the checkout.

        Raises:
            InputError: one of the two is not given; the interpreter is no program; the folder has no ``abcrown.py``.
        """
        program = _given(python, PYTHON, accepted := f"--abcrown-python or {PYTHON} with its interpreter")
        if not (path := shutil.which(program)):
            found = "a file that is not executable" if Path(program).is_file() else "no such program"
            raise InputError(f"{program}: found {found}; accepted: {accepted}")
        folder = Path(_given(home, HOME, accepted := f"--abcrown-home or {HOME} with its checkout")).absolute()
        for place in (folder, folder / "complete_verifier"):
            if (place / "abcrown.py").is_file():
                return cls(Path(path).absolute(), place)  # not resolved: a venv's interpreter is a link
        raise InputError(f"{folder}: found no complete_verifier/abcrown.py; accepted: {accepted}")

    @cached_property
    def _probe(self) -> tuple[dict[str, str], dict[str, str]]:
        """(versions, missing): versions of its libraries, and reasons why others cannot be imported, by its own
        interpreter in its folder."""
        command, env = [self.python, "-c", PROBE], _environment(self.python)
        try:
            result = subprocess.run(command, cwd=self.home, env=env, timeout=120, capture_output=True, errors="replace")
        except (OSError, subprocess.TimeoutExpired) as error:
            return {}, {str(self.python): str(error)}
        report = re.findall(r"^FOUND (.*)$", result.stdout, re.MULTILINE)
        why = f"exit code {result.returncode}: {result.stderr.strip()[-200:]}"
        return json.loads(report[-1]) if report else ({}, {str(self.python): why})

    def missing(self) -> list[str]:
        """One line for each library that keeps it from starting, with the install command. Takes about 10 s."""
        install = {name: f"{self.python} -m pip install {PIP.get(name, name)}" for name in self._probe[1]}
        install["auto_LiRPA"] = f"git -C {self.home.parent} submodule update --init --recursive"
        return [f"{name}: {why or f'not installed; {install[name]}'}" for name, why in self._probe[1].items()]

    def versions(self) -> dict[str, str]:
        """Versions of its libraries, by name, and the commits of its folders where these are git checkouts."""
        names, top = ("python", "torch", "auto_LiRPA", "onnx2pytorch"), self.home.parent
        versions = {name: self._probe[0][name] for name in names if name in self._probe[0]}
        for name, folder in (("commit", top), ("auto_LiRPA commit", top / "auto_LiRPA")):
            if (folder / ".git").exists() and shutil.which("git"):
                result = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True)
                versions |= {} if result.returncode else {name: result.stdout.strip()}
        return versions

    def run(
        self, network: Path, properties: Sequence[Path], *, shape: Sequence[int], settings: Settings, logs: Path
    ) -> Generator[AbcrownAnswer]:
        """Yield an answer for each property, in order, as soon as it is known. Closing the generator ends the process.

        A property on which the process crashes is an ``error``, one on which it hangs a ``timeout``; a new process
        continues with the next. After ``MOST_CRASHES`` crashes in a row without an answer between them the rest are
        errors without being tried.

        Args:
            network: ONNX file for images (B, *shape), with a dynamic batch dimension and the weights inside.
            properties: VNN-LIB 1.0 files.
            settings: from ``configuration``. logs: a folder, which gets one file for each process.
        Raises:
            InputError: a file does not exist; a process ended or hung before its first property (a library is missing,
                or the network cannot be loaded), as every other would.
        """
        for path in (network, *properties):
            if not path.is_file():
                raise InputError(f"{path}: found no such file; accepted: an exported network and its properties")
        logs.mkdir(parents=True, exist_ok=True)
        settings = {**settings, "model": {"onnx_path": str(network.absolute()), "input_shape": [-1, *shape]}}
        first = fruitless = 0
        while first < len(properties):
            last = yield from self._process(first, [*properties[first:][: self.batch]], settings, logs.absolute())
            fruitless = fruitless + 1 if last.status == "error" and last.number == first else 0
            first = last.number + 1
            if fruitless == MOST_CRASHES:
                reason = f"not tried: {MOST_CRASHES} processes in a row answered nothing; the last: {last.reason}"
                for number in range(first, len(properties)):
                    yield AbcrownAnswer(number, properties[number], "error", 0.0, None, reason, last.log)
                return

    def _process(
        self, first: int, paths: list[Path], settings: Settings, logs: Path
    ) -> Generator[AbcrownAnswer, None, AbcrownAnswer]:
        """Run one process; yield its answers, the last on the property that ended it, and return the last."""
        log = logs / f"abcrown-{datetime.now():%Y%m%d-%H%M%S-%f}.log"
        timeout, inputs = float(settings["bab"]["timeout"]), math.prod(settings["model"]["input_shape"][1:])
        place, current, late, since, limit = 0, None, False, time.monotonic(), 2 * timeout + self.grace
        with TemporaryDirectory(prefix="certtrain-abcrown-") as name, writing(Path(name)):  # for its owner only
            folder = Path(name)
            command = [str(self.python), "abcrown.py", "--config", _prepare(folder, paths, settings)]
            with _running(command, self.home, {**_environment(self.python), "TMPDIR": name}, log) as process:
                for line in _lines(log, process):
                    said = None if line is None else parse(line)
                    if isinstance(said, int):
                        current, since = said, time.monotonic()
                    elif said and current == place:
                        (folder / f"{place}.vnnlib.compiled").unlink(missing_ok=True)  # as large as the property
                        point = read_counterexample(folder / f"point{place}", inputs)
                        known = (said.status(timeout), said.seconds, said.word, None, log, point)
                        yield (last := AbcrownAnswer(first + place, paths[place], *known))
                        place, since = place + 1, time.monotonic()
                        if place == len(paths):
                            return last
                    if late := line is None and time.monotonic() >= since + limit:
                        break
        ending = f"no end after {limit:g} s" if late else exit_reason(process.returncode, log)
        if current is None:
            found = f"that α-β-CROWN does not get to its first property ({ending}; see {log})"
            accepted = "an installation that passes --check-abcrown, a network that it loads"
            raise InputError(f"{self.home}: found {found}; accepted: {accepted}")
        status, seconds = "timeout" if late else "error", time.monotonic() - since
        yield (last := AbcrownAnswer(first + place, paths[place], status, seconds, None, f"{ending}, see {log}", log))
        return last


def _prepare(folder: Path, properties: Sequence[Path], settings: Settings) -> str:
    """Write its input files and return the path of the configuration. Network and properties are links in ``folder``,
    because it loads and writes pickles (.compiled, .cached) beside its input."""
    (folder / "model.onnx").symlink_to(settings["model"]["onnx_path"])
    for place, path in enumerate(properties):
        (folder / f"{place}.vnnlib").symlink_to(path.absolute())
    (folder / "properties.csv").write_text("".join(f"{place}.vnnlib\n" for place in range(len(properties))))
    files = {"root_path": str(folder), "csv_name": "properties.csv", "results_file": str(folder / "results")}
    ours = {
        "general": {**settings["general"], **files, "save_adv_example": True},
        "model": {**settings["model"], "onnx_path": str(folder / "model.onnx")},
        "attack": {**settings["attack"], "cex_path": str(folder / "point"), "adv_saver": SAVER},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({**settings, **ours}))
    return str(folder / "config.yaml")


@contextmanager
def _running(command: list[str], home: Path, env: dict[str, str], log: Path) -> Generator[Popen[bytes]]:
    """Start a process in its own session; leaving the context ends it and all processes that it started."""
    with log.open("xb", buffering=0) as out:
        process = Popen(command, cwd=home, env=env, stdin=DEVNULL, stdout=out, stderr=out, start_new_session=True)
    try:
        yield process
    finally:
        try:
            os.killpg(process.pid, signal.SIGTERM)
            until = time.monotonic() + KILL_AFTER
            while not _exited(process) and time.monotonic() < until:
                time.sleep(POLL / 10)
        finally:  # not reaped yet: the number of its group cannot belong to another
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _exited(process: Popen[bytes]) -> bool:
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _lines(log: Path, process: Popen[bytes]) -> Iterator[str | None]:
    """Yield the lines of the log until the process has ended; None whenever there is nothing new."""
    with log.open(encoding="utf-8", errors="replace") as file:
        rest, over = "", False
        while not over:
            over = _exited(process)  # before the read: then its last output is in the file
            *lines, rest = (rest + file.read()).split("\n")
            yield from lines
            yield None
            time.sleep(POLL)


def _environment(python: Path) -> dict[str, str]:
    """Our environment without the variables that point to our interpreter. PYTHONPATH stays: users may need it."""
    kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONHOME")}
    path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**kept, "PATH": path, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}


def _given(value: str | Path | None, variable: str, accepted: str) -> str:
    text = str(os.environ.get(variable, "") if value is None else value)
    if not text:
        raise InputError(f"{variable}: found nothing; accepted: {accepted}")
    return os.path.expanduser(text)
