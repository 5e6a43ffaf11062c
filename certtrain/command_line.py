"""The one command line; the scripts call it."""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from . import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 bad input, 1 training stopped, 128 + n signal n."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _Parser(prog="certtrain", description="Certified training, and the proof.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_train(commands)
    return _guarded(parser, words)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        from .errors import InputError

        raise InputError(f"{message}; accepted: see {self.prog} --help")


def _add_train(commands) -> None:
    train = commands.add_parser(
        "train",
        help="train a network by a recipe and certify it",
        description="Train a network by a recipe, then certify its test images. Every field of the recipe can be "
        "given as --section.field value, for example --loss.alpha 0.02 --training.epochs 5; numbers may be fractions.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    train.add_argument("-h", "--help", action="store_true", help="show this, and every field with its value")
    train.add_argument("--config", type=Path, metavar="FILE.yaml", help="the recipe (default: digits, CC-IBP)")
    train.add_argument("--out", type=Path, metavar="DIR", help="the run's folder (default: a new one under runs/)")
    train.add_argument("--resume", type=Path, metavar="DIR", help="go on with an interrupted run")
    train.add_argument("--debug", action="store_true", help="show the traceback of an error")
    train.set_defaults(run=_train, parser=train)


def _guarded(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Errors that a user can cause become one line on stderr."""
    from .errors import InputError
    from .training import Interrupted, TrainingStopped

    options = argparse.Namespace()
    try:
        options, rest = parser.parse_known_args(words)
        return options.run(options, rest)
    except (InputError, TrainingStopped, OSError) as error:
        if "--debug" in words:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, TrainingStopped) else 2
    except Interrupted as stopped:
        print(f"stopped by {stopped}; go on with: --resume {options.folder}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    from .pipeline import new_folder, resume, train
    from .recipe import load_config

    overrides = _pairs(rest)
    if options.resume:
        return _resume(options, overrides, resume)
    config = load_config(options.config, overrides)
    if options.help:
        return _help(options, config)
    options.folder = new_folder(config, options.out)
    print(f"run folder: {options.folder}")
    _summary(train(config, options.folder))
    return 0


def _resume(options: argparse.Namespace, overrides: dict[str, str], resume) -> int:
    from .errors import InputError

    refused = [*(f"--{name}" for name in overrides if name != "device"),
               *(f"--{name}" for name in ("config", "out") if getattr(options, name))]  # fmt: skip
    if refused:
        raise InputError(f"{refused[0]}: cannot be changed on --resume; accepted: --device, --debug")
    options.folder = options.resume
    _summary(resume(options.resume, device=overrides.get("device")))
    return 0


def _pairs(words: list[str]) -> dict[str, str]:
    """``["--loss.alpha", "0.02", "--seed=1"]`` → ``{"loss.alpha": "0.02", "seed": "1"}``."""
    from .errors import InputError

    pairs: dict[str, str] = {}
    queue = list(words)
    while queue:
        name, joined, value = queue.pop(0).partition("=")
        if not name.startswith("--") or not name[2:]:
            raise InputError(f"{name!r}: found a stray word; accepted: --section.field value, see --help")
        if not joined:
            if not queue:
                raise InputError(f"{name}: found no value; accepted: {name} VALUE")
            value = queue.pop(0)
        pairs[name[2:]] = value
    return pairs


def _help(options: argparse.Namespace, config) -> int:
    from .config import flatten, unstructure

    options.parser.print_help()
    print("\nfields, with the value that this call would use:")
    for path, value in flatten(unstructure(config)).items():
        print(f"  --{path} {'null' if value is None else value}")
    return 0


def _summary(folder) -> None:
    from rich.table import Table

    from .progress import console

    final = folder.final()
    table = Table(title=f"{folder.path}: {final['images']} test images, epsilon {final['epsilon']:.6g}")
    table.add_column("accuracy")
    table.add_column("%", justify="right")
    for name, key in (("clean", "clean"), ("under attack", "attacked"), ("certified", "certified"),
                      ("certified by IBP alone", "ibp_certified")):  # fmt: skip
        table.add_row(name, f"{100 * final[f'{key}_accuracy']:.2f}")
    console.print(table)
    console.print(f"{final['seconds']:.0f} s; verdicts of every image: {folder.path / 'verdicts.jsonl'}")
