"""The command line, which the scripts call."""

from __future__ import annotations

import argparse
import signal
import sys
import traceback
from collections.abc import Sequence

from .. import __version__
from ..streams import tolerant_streams
from . import capabilities, check, compare, diagnose, evaluate, export, import_checkpoint, train, verify
from .words import Parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Failures of the output do not end it: characters missing in the terminal's encoding are replaced; output to a reader
    that has left or to a full device is dropped. For a full device stderr names the error, and the exit code is 2.

    Returns:
        the exit code: 0 for success, 2 for bad input, 1 for stopped training or a contradiction between verifiers or
        attacks, 128 + n for signal n.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="certtrain", description="Certified training, and the proof.")
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--name", action="version", version="certtrain", help="show program's name and exit")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (train, verify, check, evaluate, diagnose, export, import_checkpoint, compare, capabilities):
        command.add(commands)
    with tolerant_streams() as out:
        try:
            code = _guarded(parser, words)
        finally:  # also when argparse exits after its help
            out.flush()
            if out.missed:
                why = f"cannot be written ({out.missed}); accepted: a place with room; files are written as ever"
                print(f"error: standard output: {why}", file=sys.stderr)
    return code or (2 if out.missed else 0)


def _guarded(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Run a command and print errors that a user can cause as one line on stderr."""
    from ..errors import Failure, InputError, Interrupted

    options = argparse.Namespace()
    try:
        options, rest = parser.parse_known_args(words)
        return options.run(options, rest)
    except (InputError, Failure, OSError) as error:
        if "--debug" in words:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, Failure) else 2
    except Interrupted as stopped:
        print(f"stopped by {stopped}; go on with: {options.go_on}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
