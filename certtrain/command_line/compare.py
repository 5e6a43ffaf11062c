"""``compare``: train and evaluate a study's recipes and seeds, and write one table."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from .words import add_plugins, one_word_and_pairs, plugin_words


def add(commands) -> None:
    compare = commands.add_parser(
        "compare",
        help="train and evaluate a study's recipes with several seeds, and write one table",
        usage="certtrain compare STUDY.yaml [options]",
        description="Train what is missing of a study, go on with what was cut short, evaluate what is not evaluated, "
        "and write table.md, table.csv and figure.png. Stopped at any moment, the same call goes on; where nothing is "
        "left to do, it does nothing.",
        allow_abbrev=False,
    )
    compare.add_argument("--out", metavar="DIR", help="the study's folder (default: runs/NAME)")
    compare.add_argument("--only", metavar="ROW,…", help="work on these rows alone; the table has all")
    compare.add_argument("--seeds", metavar="N,…", help="work on these of the study's seeds alone")
    compare.add_argument("--jobs", metavar="N", default="1", help="so many runs at a time, each with its own threads")
    compare.add_argument("--report-only", action="store_true", help="write the table of what is there")
    compare.add_argument("--no-report", action="store_true", help="write no table and no figure")
    compare.add_argument("--list", action="store_true", help="say how far each run is, and do nothing else")
    add_plugins(compare)
    compare.add_argument("--debug", action="store_true", help="show the traceback of an error")
    compare.set_defaults(run=_compare, parser=compare)


def _compare(options: argparse.Namespace, rest: list[str]) -> int:
    from ..components import load_plugins
    from ..errors import InputError
    from ..workflows.compare import compare

    options.go_on = "the same call"
    what, usage = "study", "STUDY.yaml, a file like those in configs/studies"
    path, refused = one_word_and_pairs("compare", rest, what, usage)
    if refused:
        raise InputError(f"--{next(iter(refused))}: cannot be given here; accepted: see --help")
    only = [word.strip() for word in (options.only or "").split(",") if word.strip()]
    seeds = _whole("--seeds", options.seeds.split(",")) if options.seeds else []
    (jobs,) = _whole("--jobs", [options.jobs])
    if jobs < 1:
        raise InputError(f"--jobs: found {jobs}; accepted: a whole number >= 1")
    load_plugins(options.plugins)
    if options.list:
        return _list(path, options.out)
    found = compare(
        path, out=options.out, only=only, seeds=seeds, jobs=jobs, report_only=options.report_only,
        report=not options.no_report, command="" if options.no_report else _command(path, options),
        plugins=options.plugins,
    )  # fmt: skip
    if not options.no_report:
        _show(found)
    for trial, why in found.failures.items():
        print(f"failed: {trial}: {why}", file=sys.stderr)
    return 1 if found.failures else 0


def _command(path: Path, options: argparse.Namespace) -> str:
    """The call that reproduces the numbers, without --only and --seeds, which only change the order."""
    words = ["python", "scripts/compare.py", str(path)]
    words += ["--jobs", options.jobs] if options.jobs != "1" else []
    words += plugin_words(options.plugins)
    return shlex.join(words)


def _whole(option: str, words: list[str]) -> list[int]:
    from ..errors import InputError

    for word in words:
        if not word.strip().isdecimal():
            raise InputError(f"{option}: found {word!r}; accepted: whole numbers")
    return [int(word) for word in words]


def _list(path: Path, out: str | None) -> int:
    from rich.table import Table

    from ..comparison import read_study
    from ..progress import console
    from ..workflows.compare import Comparison

    study = read_study(path)
    found = Comparison(study, study.folder if out is None else Path(out))
    table = Table(title=f"{study.name}: {found.folder}")
    table.add_column("row")
    for seed in study.seeds:
        table.add_column(f"seed {seed}")
    for label, stages in found.stages().items():
        table.add_row(label, *(stages[seed] for seed in study.seeds))
    console.print(table)
    return 0


def _show(found) -> None:
    from ..progress import console

    console.print(found.table.read_text(encoding="utf-8"), end="", markup=False)
    console.print(f"table: {found.table}")
