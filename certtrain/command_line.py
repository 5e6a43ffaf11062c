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
    _add_verify(commands)
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


def _add_verify(commands) -> None:
    verify = commands.add_parser(
        "verify",
        help="certify the test images of a finished run",
        usage="certtrain verify RUN_DIR [options]",
        description="Certify the test images of a run whose training is finished. Verdicts are written the moment "
        "their batch is known; killed at any moment, the same call goes on. Decided images stay decided; undecided "
        "ones are tried again where the call offers more: another stage, more seconds. The run's own epsilon writes "
        "RUN_DIR/verdicts.jsonl, another one RUN_DIR/verdicts/embedded-EPSILON-ARITHMETIC.jsonl.",
        epilog="Fields of the recipe's certify section are given as --certify.field value, for example "
        "--certify.batch_size 64; what is not given is as the run's recipe says.",
        allow_abbrev=False,
    )
    verify.add_argument("--images", metavar="START:STOP", help="some of the test images (default: all)")
    verify.add_argument("--epsilon", metavar="E", help="another radius, in pixel units of [0, 1], such as 2/255")
    verify.add_argument("--timeout", metavar="SECONDS", help="of an image: its share of its batches' time")
    verify.add_argument("--total-timeout", metavar="SECONDS", help="stop after so long, whatever is left")
    verify.add_argument("--stages", metavar="A,B,…", help="some of ibp, crown_ibp, attack, crown, alpha, bab")
    verify.add_argument("--arithmetic", metavar="HOW", help="in which proofs hold: nearest, real or float32")
    verify.add_argument("--device", metavar="WHERE", help="auto, cpu, cuda")
    verify.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verify.set_defaults(run=_verify, parser=verify)


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
        print(f"stopped by {stopped}; go on with: {options.go_on}", file=sys.stderr)
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
    folder = new_folder(config, options.out)
    options.go_on = f"--resume {folder}"
    print(f"run folder: {folder}")
    _summary(train(config, folder))
    return 0


def _resume(options: argparse.Namespace, overrides: dict[str, str], resume) -> int:
    from .errors import InputError

    refused = [*(f"--{name}" for name in overrides if name != "device"),
               *(f"--{name}" for name in ("config", "out") if getattr(options, name))]  # fmt: skip
    if refused:
        raise InputError(f"{refused[0]}: cannot be changed on --resume; accepted: --device, --debug")
    options.go_on = f"--resume {options.resume}"
    _summary(resume(options.resume, device=overrides.get("device")))
    return 0


def _verify(options: argparse.Namespace, rest: list[str]) -> int:
    from .config import override, structure, unstructure
    from .errors import InputError
    from .pipeline import recorded_config
    from .progress import console
    from .recipe import Config
    from .run_folder import RunFolder
    from .verification import verify

    path, overrides = _one_word_and_pairs(rest)
    for name in overrides:
        if not name.startswith("certify.") or name == "certify.images":
            raise InputError(f"--{name}: cannot be changed here; accepted: --certify.field value, see --help")
    given = {
        "perturbation.epsilon": options.epsilon, "certify.timeout": options.timeout, "device": options.device,
        "certify.arithmetic": options.arithmetic,
    }  # fmt: skip
    overrides |= {name: value for name, value in given.items() if value is not None}
    if options.stages is not None:
        overrides["certify.stages"] = f"[{options.stages}]"
    recorded = recorded_config(*RunFolder.open(path))
    config = structure(Config, override(unstructure(recorded), overrides))
    options.go_on = "the same call"
    found = verify(
        path, images=options.images, epsilon=config.perturbation.epsilon, certify=config.certify, device=config.device,
        total_timeout=None if options.total_timeout is None else _seconds(options.total_timeout),
    )  # fmt: skip
    _stages(found.records, f"{path}: {len(found.records)} test images, epsilon {found.epsilon:.6g}")
    if len(found.certificates) > 1:
        counts = (f"{arithmetic} {proved} of {asked}" for arithmetic, (proved, asked) in found.certificates.items())
        console.print(f"certificates by arithmetic: {', '.join(counts)}")
    _say_where(found.file)
    return 0


def _one_word_and_pairs(words: list[str]) -> tuple[Path, dict[str, str]]:
    """The one word that is neither an option nor an option's value, and the options."""
    from .errors import InputError

    place = 0
    while place < len(words) and words[place].startswith("--"):
        place += 1 if "=" in words[place] else 2
    if place >= len(words):
        raise InputError("verify: found no run folder; accepted: verify RUN_DIR, the folder of a finished run")
    return Path(words[place]), _pairs([*words[:place], *words[place + 1 :]])


def _seconds(text: str) -> float:
    from .config import parse_number
    from .errors import InputError

    try:
        return parse_number(text)
    except ValueError as error:
        raise InputError(f"--total-timeout: found {text!r}; accepted: seconds > 0") from error


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
    for name, key in (("clean", "clean"), ("no counterexample found", "attacked"), ("certified", "certified"),
                      ("certified by IBP alone", "ibp_certified")):  # fmt: skip
        table.add_row(name, f"{100 * final[f'{key}_accuracy']:.2f}")
    console.print(table)
    _stages([v for v in folder.verdicts if v["index"] < final["images"]], "verdicts by stage")
    console.print(f"{final['seconds']:.0f} s")
    _say_where(folder.verdicts.path)


def _stages(records, title: str) -> None:
    """Who decided what, and how long it took."""
    from rich.table import Table

    from .progress import console
    from .verifiers.records import by_stage, certified, reasons

    table = Table(title=title)
    table.add_column("stage")
    for name in (columns := ("images", "misclassified", "falsified", "verified", "seconds")):
        table.add_column(name, justify="right")
    for stage, row in by_stage(records).items():
        row = {**row, "seconds": f"{row['seconds']:.2f}"}
        table.add_row(stage, *(str(row.get(name, "")) for name in columns))
    console.print(table)
    low, high = certified(records)
    console.print(f"certified accuracy: {100 * low:.2f} %" + (f" to {100 * high:.2f} %" if high > low else ""))
    if why := reasons(records):
        console.print(f"undecided: {sum(why.values())} ({', '.join(f'{word}: {n}' for word, n in why.items())})")


def _say_where(path: Path) -> None:
    from .progress import console

    console.print(f"verdicts of every image: {path}")
