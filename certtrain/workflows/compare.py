"""Studies: train the missing runs, continue the interrupted ones, evaluate them and write the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..comparison.processes import in_processes
from ..comparison.report import write_figures, write_table
from ..comparison.results import stage_of, unanswered
from ..comparison.study import Study, Trial, read_study
from ..components import load_plugins
from ..config import flatten, unstructure
from ..errors import InputError
from ..ledger import add_once
from ..locking import exclusive, lock_of
from ..progress import console
from ..run_folder import JsonLines, RunFolder
from ..training import TrainingStopped
from .evaluate import evaluate
from .run import as_recorded, recorded_config
from .train import resume, train

CHANGEABLE_FIELDS = {
    f"evaluate.{name}"
    for name in ("enabled", "attacks", "epsilons", "images", "step_size", "batch_size", "checkpoints")
}
"""Fields of the recipe that may change after a run was trained."""


@dataclass(frozen=True)
class Comparison:
    """A study's state after a call.

    Args:
        folder: folder of the table, the figures and the runs.
        failures: by trial, the reason why it could not be finished in this call.
    """

    study: Study
    folder: Path
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def table(self) -> Path:
        return self.folder / "table.md"

    def stages(self) -> dict[str, dict[int, str]]:
        """The stage of each trial by label and seed: missing, interrupted, trained or evaluated."""
        found: dict[str, dict[int, str]] = {}
        for trial in self.study.trials(self.folder):
            found.setdefault(trial.row.label, {})[trial.seed] = stage_of(trial)
        return found


def compare(
    file: str | Path,
    *,
    out: str | Path | None = None,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    jobs: int = 1,
    report_only: bool = False,
    report: bool = True,
    command: str = "",
    plugins: Sequence[str | Path] = (),
    quiet: bool = False,
) -> Comparison:
    """Finish a study: train missing runs, continue interrupted ones, evaluate them, and write ``table.md``,
    ``table.csv``, ``figure.png`` and the study's curves. A repeated call does what is left.

    Args:
        file: the study in YAML.
        out: folder of the study; None for ``runs/<name>``.
        only: rows to work on, by label or by the name of a sweep; none for all. The table has all rows.
        seeds: seeds to work on; none for all of the study.
        jobs: number of processes, each with its recipe's threads.
        report_only: train and evaluate nothing.
        report: whether to write table and figures.
        command: the call to record as the source of the numbers.
        plugins: modules or files whose classes recipes may name, see docs/plugins.md.
    Raises:
        InputError: the study is invalid, or a folder holds a run of another recipe; raised before any training.
        Interrupted: SIGINT or SIGTERM; the runs are saved, and the same call continues.
    """
    load_plugins(plugins)
    study = read_study(file)
    folder = study.folder if out is None else Path(out)
    chosen = choose(study, folder, only, seeds)
    for trial in study.trials(folder):
        if (trial.path / "run.json").exists():
            check_recipe(trial)
    failures: dict[str, str] = {}
    left = [] if report_only else [trial for trial in chosen if stage_of(trial) != "evaluated"]
    for trial in left:
        trial.config.evaluate.check_ball(trial.config.perturbation)
    if left:
        _remember(folder, command)
        work = in_processes(left, jobs, study.file, folder, plugins, quiet) if jobs > 1 else _one_by_one(left, quiet)
        for trial, why in work:
            if why:
                failures[str(trial)] = why
            if report:
                write_table(study, folder, failures)
    if report:
        write_table(study, folder, failures)
        write_figures(study, folder)
    return Comparison(study, folder, failures)


def choose(study: Study, folder: Path, only: Sequence[str], seeds: Sequence[int]) -> list[Trial]:
    """The trials with these rows and seeds; none for all.

    Raises:
        InputError: the study does not have a row or seed.
    """
    names = {name for row in study.rows for name in (row.label, row.group)}
    for name in only:
        if name not in names:
            raise InputError(f"--only: found {name!r}; accepted: {', '.join(row.label for row in study.rows)}")
    for seed in seeds:
        if seed not in study.seeds:
            raise InputError(f"--seeds: found {seed}; accepted: {', '.join(map(str, study.seeds))}, the study's")
    return [
        trial
        for trial in study.trials(folder)
        if (not only or trial.row.label in only or trial.row.group in only) and (not seeds or trial.seed in seeds)
    ]


def finish(trial: Trial, quiet: bool) -> None:
    """Train or continue one run and evaluate it, while excluding other processes.

    Raises:
        InputError: an input cannot be used, or another process works on the run.
        TrainingStopped, Interrupted: as ``train``.
    """
    trial.path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(lock_of(trial.path), str(trial.path)):
        if (trial.path / "run.json").exists():
            check_recipe(trial)
            if stage_of(trial) == "interrupted":
                resume(trial.path, quiet=quiet)
        else:
            for half in trial.path.glob(".run.json.*.tmp"):  # of a process killed before run.json was written
                half.unlink()
            train(trial.config, trial.path, quiet=quiet)
        if any(unanswered(trial)):
            evaluate(trial.path, settings=trial.config.evaluate, quiet=quiet)


def check_recipe(trial: Trial) -> None:
    """Check that the trial's run was started with the recipe of the study.

    Raises:
        InputError: it was started with another recipe; names the field.
    """
    folder, description = RunFolder.open(trial.path)
    recipes = recorded_config(folder, description), as_recorded(trial.config, description)
    found, wanted = (flatten(unstructure(recipe)) for recipe in recipes)
    for name in [*wanted, *found]:
        if name not in CHANGEABLE_FIELDS and found.get(name) != wanted.get(name):
            raise InputError(
                f"{trial.path}: {name}: found a run with {found.get(name)!r}; accepted: {wanted.get(name)!r}, as "
                "the study says, or another --out"
            )


def _one_by_one(trials: Sequence[Trial], quiet: bool):
    for number, trial in enumerate(trials, start=1):
        if not quiet:
            console.print(f"{number}/{len(trials)}  {trial}: {stage_of(trial)}", markup=False)
        try:
            finish(trial, quiet)
        except InputError as error:
            raise InputError(f"{trial}: {error}") from error
        except TrainingStopped as error:
            yield trial, str(error)
        else:
            yield trial, None


def _remember(folder: Path, command: str) -> None:
    """Record the call that made the numbers, for the table."""
    folder.mkdir(parents=True, exist_ok=True)
    if command:
        add_once(JsonLines(folder / "calls.jsonl"), {"command": command}, "command")
