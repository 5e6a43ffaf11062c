"""Several trials at a time, each as a ``compare`` in its own process."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import InputError
from ..progress import console
from ..training import StopRequest
from .study import Trial

START = "import sys; from certtrain.command_line import main; sys.exit(main(sys.argv[1:]))"
POLL = 0.05


def in_processes(
    trials: Sequence[Trial], jobs: int, study: Path, folder: Path, plugins: Sequence[str | Path], quiet: bool
) -> Iterator[tuple[Trial, str | None]]:
    """Finish the trials, at most ``jobs`` at a time. Yields each finished trial with the reason of its failure or None.

    The output of the processes goes to ``<folder>/logs/``. SIGINT and SIGTERM are passed on to them.

    Raises:
        InputError: a process was refused an input; raised after the others have saved their runs.
        Interrupted: a signal stopped the trials.
    """
    waiting, running = deque(trials), dict[subprocess.Popen, Trial]()
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    refused, ended, told = None, 0, set[subprocess.Popen]()
    with StopRequest() as stop:
        try:
            while running or (waiting and not (refused or stop.signal)):
                while waiting and len(running) < jobs and not (refused or stop.signal):
                    trial = waiting.popleft()
                    running[_start(trial, study, folder, plugins, logs)] = trial
                time.sleep(POLL)
                for process in running.keys() - told if stop.signal or refused else ():
                    process.terminate()  # once: the process saves its run
                    told.add(process)
                for process in [process for process in running if process.poll() is not None]:
                    trial, ended = running.pop(process), ended + 1
                    log = logs / f"{trial.path.name}.log"
                    why = None if process.returncode == 0 else _failure_reason(trial, log, process)
                    refused = refused or (why if process.returncode == 2 else None)
                    if not quiet:
                        became = "saved" if stop.signal and why else why or "done"
                        console.print(f"{ended}/{len(trials)}  {trial}: {became}", markup=False)
                    if not (stop.signal or refused):
                        yield trial, why
        finally:
            for process in running:
                process.terminate()
                process.wait()
    stop.raise_if_requested()
    if refused:
        raise InputError(refused)


def _start(trial: Trial, study: Path, folder: Path, plugins: Sequence[str | Path], logs: Path) -> subprocess.Popen:
    words = ["compare", str(study), "--out", str(folder), "--only", trial.row.label, "--seeds", str(trial.seed),
             "--no-report", *(word for plugin in plugins for word in ("--plugin", str(plugin)))]  # fmt: skip
    with (logs / f"{trial.path.name}.log").open("ab") as log:
        # a session of its own: a terminal's Ctrl-C reaches this process alone, which hands it on once
        return subprocess.Popen(
            [sys.executable, "-c", START, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


def _failure_reason(trial: Trial, log: Path, process: subprocess.Popen) -> str:
    """The reason of a failure: the last line that the process wrote, or its exit status."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if process.returncode < 0:
        return f"ended by signal {-process.returncode}; see {log}"
    return (
        lines[-1].removeprefix(f"failed: {trial}: ").removeprefix("error: ")
        if lines
        else f"ended with code {process.returncode}"
    )
