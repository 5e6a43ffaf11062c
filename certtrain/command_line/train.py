"""``train``: run a recipe from start to end."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from .tables import accuracies, summary
from .words import add_plugins, pairs, plugin_words


def add(commands) -> None:
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
    add_plugins(train)
    train.add_argument("--debug", action="store_true", help="show the traceback of an error")
    train.set_defaults(run=_train, parser=train)


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    from ..components import load_plugins
    from ..recipe import load_config
    from ..workflows.run import new_folder
    from ..workflows.train import resume, train

    overrides = pairs(rest)
    load_plugins(options.plugins)
    if options.resume:
        return _resume(options, overrides, resume)
    config = load_config(options.config, overrides)
    if options.help:
        return _help(options, config)
    folder = new_folder(config, options.out)
    options.go_on = _resumed(folder, options)
    _show(train(config, folder))
    return 0


def _resume(options: argparse.Namespace, overrides: dict[str, str], resume) -> int:
    from ..errors import InputError

    refused = [*(f"--{name}" for name in overrides if name != "device"),
               *(f"--{name}" for name in ("config", "out") if getattr(options, name))]  # fmt: skip
    if refused:
        raise InputError(f"{refused[0]}: cannot be changed on --resume; accepted: --device, --plugin, --debug")
    options.go_on = _resumed(options.resume, options)
    _show(resume(options.resume, device=overrides.get("device")))
    return 0


def _resumed(folder: Path, options: argparse.Namespace) -> str:
    """The call that continues a run."""
    return shlex.join(["--resume", str(folder), *plugin_words(options.plugins)])


def _show(folder) -> None:
    summary(folder)
    if folder.evaluation.exists():
        accuracies(folder)


def _help(options: argparse.Namespace, config) -> int:
    from ..config import flatten, section_of, unstructure

    options.parser.print_help()
    print("\nfields, with the value that this call would use:")
    for path, value in flatten(unstructure(config)).items():
        empty = f"null  # or {section}" if value is None and (section := section_of(config, path)) else "null"
        print(f"  --{path} {empty if value is None else value}")
    return 0
