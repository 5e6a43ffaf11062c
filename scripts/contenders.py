"""Verifiers as processes of their own: certtrain's checkouts and α-β-CROWN, each run on one core, with what it used.

Contenders are handed the same files and the same limit. What a process used is read from its own resource usage
(``child_usage``), so start-up, reading and children of its own are included.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

import certtrain
from certtrain.errors import InputError
from certtrain.verifiers.abcrown import ANSI, Abcrown, ResultLine, configuration, parse
from certtrain.verifiers.instances import Instance
from certtrain.verifiers.problem import Status
from certtrain.verifiers.vnncomp import RESULTS
from certtrain.verifiers.vnnlib import write_property

HERE = Path(__file__).resolve().parent
CLOCK = HERE / "processor_clock"
GRACE = 60.0  # seconds behind twice the limit after which a contender is ended, as in verifiers/abcrown.py
BUSY = 20.0  # under the processor's clock: how many times as long, because it waits for the processor
WORDS: dict[Status, str] = {"verified": "holds", "falsified": "violated", "timeout": "timeout", "unknown": "unknown"}
PUBLISHED = {
    "oval|_kw": "vnncomp22/oval22.yaml", "resnet_?[24]b": "vnncomp21/cifar10-resnet.yaml",
    "mnist.*256x": "vnncomp22/mnistfc.yaml", "ACASXU": "vnncomp21/acasxu.yaml",
}  # fmt: skip
"""α-β-CROWN's published settings (in its folder exp_configs), by an expression found in the network's file name."""
SPLITS_LINE = re.compile(r"Number of Verified Splits: ([0-9]+) of ([0-9]+)")


@dataclass(frozen=True)
class Usage:
    """Usage of a process and its children: wall-clock and CPU seconds, and the peak of its memory in MiB.

    Args:
        code: exit code; minus the signal that ended it. ended: whether it ran for too long and was ended.
        output: all that it printed.
    """

    wall: float
    processor: float
    peak_mib: float
    code: int
    ended: bool
    output: str


@dataclass(frozen=True)
class Ran:
    """A contender's answer on an instance: a word of ``Answer.word``, and what its process used.

    Args:
        counts: ``children`` bounded and subproblems ``closed`` in its search, where they were asked for.
    """

    answer: str
    usage: Usage
    counts: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class Track:
    """How contenders are run.

    Args:
        core: the processor core of all of them.
        processor_clock: whether their own clocks count CPU seconds, so that limits hold on a busy machine.
    """

    core: int
    processor_clock: bool = False

    def measured(
        self,
        command: Sequence[str | Path],
        limit: float,
        env: Mapping[str, str],
        path: str = "",
        cwd: Path | None = None,
    ) -> Usage:
        """Run a command with the modules in ``path`` (PYTHONPATH); end it after twice the limit and ``GRACE`` s."""
        given = {name: value for name, value in env.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
        paths = os.pathsep.join(filter(None, (str(CLOCK) if self.processor_clock else "", path)))
        given |= {"OMP_NUM_THREADS": "1", **({"PYTHONPATH": paths} if paths else {})}
        most = (2 * limit + GRACE) * (BUSY if self.processor_clock else 1)
        with tempfile.TemporaryDirectory(prefix="certtrain-benchmark-") as name:
            report, log = Path(name) / "usage.json", Path(name) / "log"
            launcher = [sys.executable, "-I", "-S", HERE / "child_usage.py", self.core, most, report, *command]
            with log.open("wb") as out:
                process = subprocess.Popen(
                    [*map(str, launcher)], stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=given, cwd=cwd
                )
                try:
                    process.wait()
                finally:
                    if process.poll() is None:
                        process.send_signal(signal.SIGTERM)  # which ends the contender as well
                        process.wait()
            output = log.read_text(errors="replace")
            if not report.exists():
                why = f"that it cannot be started ({output.strip()[-300:]})"
                raise InputError(f"{command[0]}: found {why}; accepted: a program")
            return Usage(**json.loads(report.read_text()), output=output)


class Contender(ABC):
    """A verifier that answers an instance by a process of its own.

    Args:
        name: how it is called in the results.
    """

    name: str

    @abstractmethod
    def answer(self, instance: Instance, limit: float, track: Track) -> Ran:
        """Answer an instance, whose paths are absolute, within ``limit`` seconds."""

    @abstractmethod
    def search(self, instance: Instance, limit: float, track: Track) -> Ran:
        """``answer``, with counts."""

    def start_up(self, track: Track) -> Usage:
        """Usage of an answer on a network of two neurons: the second of two runs, so that caches are filled."""
        with tempfile.TemporaryDirectory(prefix="certtrain-benchmark-") as name:
            instance = tiny(Path(name))
            self.answer(instance, 60.0, track)
            ran = self.answer(instance, 60.0, track)
        if ran.answer != "holds":
            raise InputError(
                f"{self.name}: found {ran.answer!r} on a tiny network that holds:\n{ran.usage.output[-2000:]}"
            )
        return ran.usage


@dataclass(frozen=True)
class Checkout(Contender):
    """A checkout of certtrain, run by this interpreter.

    Args:
        tree: its folder. more: further arguments of ``verify``.
    """

    name: str
    tree: Path
    more: tuple[str, ...] = ()

    def command(self, *arguments: str | Path) -> list[str | Path]:
        return [sys.executable, self.tree / "scripts" / "verify.py", *arguments, *self.more]

    def answer(self, instance: Instance, limit: float, track: Track, *more: str | Path) -> Ran:
        files = ("--onnx", instance.network, "--vnnlib", instance.property)
        command = self.command(*files, "--timeout", f"{limit:g}", *more)
        usage = track.measured(command, limit, os.environ, str(self.tree))
        said = [word for line in usage.output.splitlines() for word in line.split()[:1] if word in RESULTS]
        return Ran(said[-1] if said else "error", usage)

    def search(self, instance: Instance, limit: float, track: Track) -> Ran:
        if (self.tree / "verifiers" / "search_statistics.py").is_file():
            return self._recorded_search(instance, limit, track)
        command = [sys.executable, HERE / "counted_search.py", instance.network, instance.property, f"{limit:g}"]
        usage = track.measured(command, limit, os.environ, str(self.tree))
        lines = [line for line in usage.output.splitlines() if line.startswith("{")]
        if not lines:
            return Ran("error", usage)
        counts = json.loads(lines[-1])
        return Ran(counts.pop("answer"), usage, counts)

    def _recorded_search(self, instance: Instance, limit: float, track: Track) -> Ran:
        """``search`` by a checkout whose answers record the counts."""
        with tempfile.TemporaryDirectory(prefix="certtrain-benchmark-") as name:
            file = Path(name) / "record.json"
            ran = self.answer(instance, limit, track, "--json", file)
            return Ran(ran.answer, ran.usage, json.loads(file.read_text())["search"] or {} if file.exists() else {})

    def table(self, path: Path, limit: float, track: Track) -> tuple[Usage, dict[str, str]]:
        """Answer a table of instances by one process: (usage, words by the property as the table names it)."""
        count = len(path.read_text().splitlines())
        with tempfile.TemporaryDirectory(prefix="certtrain-benchmark-") as name:
            results = Path(name) / "results.csv"
            command = self.command("--instances", path, "--results", results, "--timeout", f"{limit:g}")
            usage = track.measured(command, limit * count, os.environ, str(self.tree))
            lines = results.read_text().splitlines() if results.exists() else []
        words = {result: word for word, result in RESULTS.items()}
        return usage, {line.rsplit(",", 3)[1]: words[line.rsplit(",", 3)[2]] for line in lines}


@dataclass(frozen=True)
class AlphaBetaCrown(Contender):
    """An installation of α-β-CROWN, with its published settings for the benchmark that a network belongs to.

    Three settings are changed: the device is the CPU; cuts are off where they need CPLEX; branch and bound stands where
    they ask for integer programs, which need a licence of Gurobi. Other networks get certtrain's ``configuration``.

    Args:
        published: files of settings, relative to its ``exp_configs``, by an expression in the network's file name.
    """

    name: str
    installation: Abcrown
    published: Mapping[str, str] = field(default_factory=lambda: PUBLISHED)

    def settings(self, network: str, limit: float) -> dict[str, Any]:
        """Its settings for a network, without the files."""
        for expression, path in self.published.items():
            if re.search(expression, Path(network).name):
                found: dict[str, Any] = yaml.safe_load((self.installation.home / "exp_configs" / path).read_text())
                break
        else:
            return {key: dict(value) for key, value in configuration(limit, "cpu").items()}
        found.pop("data", None)  # which instances of its table are run
        bab = found.setdefault("bab", {})
        bab["timeout"] = limit
        if bab.get("cut", {}).get("cplex_cuts"):
            bab["cut"] = {"enabled": False}
        general = found["general"]
        general["device"] = "cpu"
        if general.get("complete_verifier") in ("bab-refine", "mip"):
            general["complete_verifier"] = "bab"
        return found

    def _run(self, instance: Instance, limit: float, track: Track) -> Usage:
        """One process. Its files are links in a folder of their own, because it leaves pickles beside the properties
        and reads them the next time."""
        with tempfile.TemporaryDirectory(prefix="certtrain-benchmark-") as name:
            folder, python = Path(name), self.installation.python
            (folder / "network.onnx").symlink_to(instance.network)
            (folder / "property.vnnlib").symlink_to(instance.property)
            (folder / "instances.csv").write_text(f"network.onnx,property.vnnlib,{limit:g}\n")
            settings = self.settings(instance.network, limit)
            files = {"root_path": name, "csv_name": "instances.csv", "results_file": str(folder / "results")}
            settings["general"] = {**settings["general"], **files}
            (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
            path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
            env = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1", "TMPDIR": name}
            command = [python, "abcrown.py", "--config", folder / "settings.yaml"]
            return track.measured(command, limit, env, cwd=self.installation.home)

    def answer(self, instance: Instance, limit: float, track: Track) -> Ran:
        usage = self._run(instance, limit, track)
        output = ANSI.sub("", usage.output)
        results = [said for line in output.splitlines() if isinstance(said := parse(line), ResultLine)]
        splits = [(int(closed), int(of)) for closed, of in SPLITS_LINE.findall(output)]
        counts = {"children": sum(of for _, of in splits), "closed": sum(closed for closed, _ in splits)}
        word = WORDS.get(results[-1].status(limit), "error") if results else "timeout" if usage.ended else "error"
        return Ran(word, usage, counts)

    def search(self, instance: Instance, limit: float, track: Track) -> Ran:
        return self.answer(instance, limit, track)


def tiny(folder: Path) -> Instance:
    """An instance that holds by its first bounds: a network of two neurons and its property, written to a folder."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(torch.eye(2))  # type: ignore[reportCallIssue]
            layer.bias.copy_(torch.tensor([2.0, 0.0]))  # type: ignore[reportCallIssue]
    with torch.enable_grad():  # as exporters want it
        certtrain.export_onnx(model, folder / "tiny.onnx", torch.rand(1, 2))
    write_property(folder / "tiny.vnnlib", torch.zeros(2), torch.ones(2) / 2, 0, 2)
    return Instance(str(folder / "tiny.onnx"), str(folder / "tiny.vnnlib"), 60.0)
